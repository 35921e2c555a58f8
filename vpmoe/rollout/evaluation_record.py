"""The record of a stage's evaluation: steps/<stage>-evaluate/evaluation.json, written once.

It holds nothing of the attempt that wrote it, no time and no speed; those are in the metrics.
vpmoe.evaluation measures it, gate.py decides by it.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Self, get_args

from pydantic import ConfigDict, Field, ValidationError, model_validator

from vpmoe.api import DistillRun
from vpmoe.api.base import Record
from vpmoe.api.effort import Effort
from vpmoe.api.progress import SpanLoss
from vpmoe.failure import Permanent
from vpmoe.rollout.validity import VALID
from vpmoe.storage import Bucket, paths


class EffortResult(Record):
    """The completions at one reasoning effort."""

    model_config = ConfigDict(extra="forbid")

    validity: dict[str, Annotated[int, Field(ge=0)]]
    """Number of completions by validity (validity.VALIDITIES); at least one is counted."""
    mean_tokens: float
    """Mean length in tokens, stop token included."""
    most_tokens: int
    """Length of the longest completion."""

    @model_validator(mode="after")
    def _counts_completions(self) -> Self:
        if not sum(self.validity.values()):
            raise ValueError("validity counts no completion")
        return self


class CanaryResult(Record):
    """How well the student predicts text that is in no training data."""

    model_config = ConfigDict(extra="forbid")

    bits_per_byte: float
    """−Σ log2 p of the counted tokens, divided by their bytes."""
    bytes: int
    """Number of bytes counted: all but each text's first token."""
    sha256: str
    """Digest of the texts. Do not compare figures of different texts."""


class EvaluationRecord(Record):
    """The measurements of the student at the end of a stage."""

    model_config = ConfigDict(extra="forbid")

    run: str
    """namespace/name-uid8."""
    config: str
    """sha256 of the run's configuration."""
    stage: str
    iteration: int
    """Optimizer steps over all stages; names the checkpoint."""
    checkpoint: str
    """sha256 of the checkpoint's manifest."""
    documents: int = 0
    """Number of held-out documents scored."""
    held_out: SpanLoss | None = None
    """Their mean negative log-likelihood by span, in nats per token; None if none was scored."""
    completions: int = 0
    """Number of completions sampled."""
    validity: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    """Number of completions by validity (validity.VALIDITIES); empty if none was sampled."""
    efforts: dict[str, EffortResult] = Field(default_factory=dict)
    """Validity and lengths by reasoning effort."""
    canary: CanaryResult | None = None
    """None if a version that had no canary of its own wrote the record, and evaluation.canary was not set."""

    @model_validator(mode="after")
    def _counts_each_completion(self) -> Self:
        if sum(self.validity.values()) != self.completions:
            raise ValueError("validity does not count as many completions as there are")
        return self

    @property
    def valid_share(self) -> float | None:
        """Share of valid completions, None if none was sampled."""
        return valid_share(self.validity) if self.completions else None

    def valid_share_by_effort(self) -> dict[str, float]:
        """Share of valid completions by effort, from low to high."""
        return {
            effort: valid_share(self.efforts[effort].validity)
            for effort in get_args(Effort)
            if effort in self.efforts
        }


def valid_share(validity: Mapping[str, int]) -> float:
    """Share of valid completions. At least one must be counted."""
    return validity.get(VALID, 0) / sum(validity.values())


def load_evaluation(run: DistillRun, stage: str, bucket: Bucket) -> EvaluationRecord | None:
    """A stage's evaluation, None if it was not made.

    Raises Permanent if the object is malformed, StorageError.
    """
    key = paths.evaluation(run, stage)
    return parse_evaluation(bucket.get_json(key), stage, bucket.url(key)) if bucket.exists(key) else None


def parse_evaluation(found: Any, stage: str, where: str) -> EvaluationRecord:
    """An evaluation from its JSON. Raises Permanent, with the address `where`, if it is malformed."""
    try:
        return EvaluationRecord.model_validate(found)
    except ValidationError as error:
        fault = error.errors()[0]
        raise Permanent(
            f"{where}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}. It was altered, or written by "
            "another version; delete it to have it measured again: python -m jobs.evaluate --step "
            f"{stage}-evaluate."
        ) from error
