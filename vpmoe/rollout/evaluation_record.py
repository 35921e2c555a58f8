"""What is known of the student at the end of a stage: steps/<stage>-evaluate/evaluation.json, written once.

It holds nothing of the attempt that wrote it, no time and no speed: those stand in the metrics beside it. Measuring is evaluate.py's
business.
"""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import ConfigDict, Field, ValidationError

from vpmoe.api import DistillRun
from vpmoe.api.base import Record
from vpmoe.api.dataset import Effort
from vpmoe.api.progress import SpanLoss
from vpmoe.failure import Permanent
from vpmoe.storage import Bucket, paths

VALID = "valid"
"""What prompt.validity calls a completion that is one."""


class OfEffort(Record):
    """Completions at one reasoning effort."""

    model_config = ConfigDict(extra="forbid")

    validity: dict[str, int]
    """How many are each of prompt.VALIDITIES."""
    mean_tokens: float
    """Mean length, stop token included."""
    most_tokens: int
    """Length of the longest."""


class Canary(Record):
    """How well the student predicts text that nobody trains on."""

    model_config = ConfigDict(extra="forbid")

    bits_per_byte: float
    """−Σ log2 p of the tokens counted, over their bytes."""
    bytes: int
    """Bytes counted: all but each text's first token."""
    sha256: str
    """Of the texts: figures of other texts are no comparison."""


class EvaluationRecord(Record):
    """The student at the end of a stage."""

    model_config = ConfigDict(extra="forbid")

    run: str
    """namespace/name-uid8."""
    config: str
    """The run's configuration, sha256."""
    stage: str
    iteration: int
    """Optimizer steps over all stages: the checkpoint's name."""
    checkpoint: str
    """sha256 of the checkpoint's manifest."""
    documents: int = 0
    """Held-out documents scored."""
    held_out: SpanLoss | None = None
    """Their mean negative log-likelihood by span, in nats a token; None where none was scored."""
    completions: int = 0
    """Completions sampled."""
    validity: dict[str, int] = Field(default_factory=dict)
    """How many of them are each of prompt.VALIDITIES; empty where none was sampled."""
    efforts: dict[str, OfEffort] = Field(default_factory=dict)
    """The same, and their lengths, by reasoning effort."""
    canary: Canary | None = None
    """None where evaluation.canary is not set."""

    @property
    def valid(self) -> float | None:
        """Share of valid completions, None where none was sampled."""
        return share(self.validity) if self.completions else None

    def shares(self) -> dict[str, float]:
        """Share of valid completions by effort, from low to high."""
        return {
            effort: share(self.efforts[effort].validity)
            for effort in get_args(Effort)
            if effort in self.efforts
        }


def share(validity: Mapping[str, int]) -> float:
    """Share of valid completions among those counted, of which there is one at least."""
    return validity.get(VALID, 0) / sum(validity.values())


def load(run: DistillRun, stage: str, bucket: Bucket) -> EvaluationRecord | None:
    """A stage's evaluation, None where it has not been made. Raises Permanent where the object is none, StorageError."""
    key = paths.evaluation(run, stage)
    return read(bucket.get_json(key), stage, bucket.url(key)) if bucket.exists(key) else None


def read(said: Any, stage: str, where: str) -> EvaluationRecord:
    """An evaluation from its JSON; `where` is its address, for people. Raises Permanent where it is none."""
    try:
        return EvaluationRecord.model_validate(said)
    except ValidationError as error:
        fault = error.errors()[0]
        raise Permanent(
            f"{where}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}. It was altered, or written by another version; delete it to "
            f"have it measured again: python -m jobs.evaluate --step {stage}-evaluate."
        ) from error
