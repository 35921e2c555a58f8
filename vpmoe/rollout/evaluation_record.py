"""The record of a stage's evaluation: steps/<stage>-evaluate/evaluation.json, written once, and those of its
checkpoints' validity: steps/<stage>-validity/evaluation-000003.json, each written once.

They hold nothing of the attempt that wrote them, no time and no speed; those are in the metrics.
vpmoe.evaluation measures them. gate.py decides by the first, the trainer's `stop` by the others.
"""

import re
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


def measured_validities(run: DistillRun, stage: str, bucket: Bucket) -> list[int]:
    """The numbers of the validities that were measured while a stage trained, in order."""
    prefix = paths.validity(run, stage, 0).removesuffix("000000.json")
    names = (found.key.removeprefix(prefix) for found in bucket.list(prefix))
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"(\d{6,})\.json", name)))


def load_validity(run: DistillRun, stage: str, bucket: Bucket, number: int) -> EvaluationRecord:
    """A validity that was measured while a stage trained. Raises Permanent if it is malformed or counts no
    completion, StorageError."""
    key = paths.validity(run, stage, number)
    found = parse_evaluation(bucket.get_json(key), stage, bucket.url(key), "validity")
    if not found.completions:
        raise Permanent(f"{bucket.url(key)} counts no completion. Delete it to have it measured again.")
    return found


def parse_evaluation(found: Any, stage: str, where: str, step: str = "evaluate") -> EvaluationRecord:
    """An evaluation from its JSON. `step`: suffix of the step that makes it.

    Raises Permanent, with the address `where`, if it is malformed.
    """
    try:
        return EvaluationRecord.model_validate(found)
    except ValidationError as error:
        fault = error.errors()[0]
        raise Permanent(
            f"{where}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}. It was altered, or written by "
            "another version; delete it to have it measured again: python -m jobs.evaluate --step "
            f"{stage}-{step}."
        ) from error
