"""Progress of a step: its pods serve it, and the operator copies it into status. The job also writes it to
steps/<step>/progress.json, for people and reports.

It holds what the operator's decisions and the status need. All other measurements are in the metrics.
"""

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vpmoe.api.base import AnyText, Record

Count = Annotated[int, Field(ge=0)]
Hash = Annotated[str, Field(max_length=64)]
Address = Annotated[str, Field(max_length=2048)]

COMMIT = re.compile(r"([0-9a-f]{40}([0-9a-f]{24})?)?")


def _commit_or_none(value: Any) -> Any:
    """The value if it is a commit or empty. Anything else is None: a commit that is cut off or wrong is not
    known, and the rest of what a process says still counts."""
    return value if isinstance(value, str) and COMMIT.fullmatch(value) else None


Commit = Annotated[str | None, BeforeValidator(_commit_or_none)]
"""Commit of the code of a process, 40 or 64 hex digits. Empty if the process does not know it: its image has
no file with it. None if it does not say: it is of an older version."""

PROGRESS_BYTES = 65_536
"""Bytes of a Progress as JSON that a pod serves at most. The operator reads no more."""


class Amount(Record):
    """A count and its total."""

    done: Count
    """Number done so far."""
    total: Count
    """Total number, as far as it is known."""


class SpanLoss(Record):
    """Mean negative log-likelihood of each span, in nats per token; None if the span has no tokens."""

    reasoning: float | None = None
    """Mean negative log-likelihood of reasoning tokens, in nats per token."""
    final: float | None = None
    """Mean negative log-likelihood of the tokens of final answers, in nats per token."""


class HeldOut(Record):
    """Held-out loss of a training step."""

    before: SpanLoss | None = None
    """Held-out loss before the first optimizer step."""
    latest: SpanLoss | None = None
    """Held-out loss at the latest evaluation."""


class DatasetStatus(Record):
    """The dataset of a step or run."""

    id: Hash
    """The dataset's id, 64 hex digits."""
    manifest: Address
    """s3:// URL of the dataset's manifest."""
    sha256: Hash
    """SHA-256 of the manifest's bytes, 64 hex digits."""


class CheckpointStatus(Record):
    """The latest checkpoint whose manifest is in the bucket."""

    iteration: Count
    """Number of optimizer steps at the checkpoint, over all stages."""
    tokens: Count
    """Tokens of the stage trained on at the checkpoint."""
    manifest: Address
    """s3:// URL of the checkpoint's manifest."""
    sha256: Hash
    """SHA-256 of the manifest's bytes, 64 hex digits."""


class ProgressCondition(Record):
    """A condition that the job adds to the run's status, such as RouterCollapse."""

    type: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z0-9]{0,63}$")]
    """Name of the condition in CamelCase."""
    status: Literal["True", "False", "Unknown"]
    """Whether the condition holds."""
    reason: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z0-9]{0,127}$")]
    """Reason as one CamelCase word."""
    message: AnyText = ""
    """Reason as a sentence."""


class Progress(Record):
    """Progress of one step. Each update replaces the one before."""

    run: str | None = None
    """DistillRun.identity of the run, namespace/name-uid8: an address may be another run's by now. Absent in
    what an older version wrote."""
    step: str
    """Name of the step."""
    attempt: Annotated[int, Field(ge=1)]
    """Number of the attempt that wrote this."""
    state: Literal["Running", "Succeeded"]
    """Succeeded is written once, when all outputs of the step are in the bucket. A failure is reported by the
    pod's exit code and not here."""
    message: AnyText = ""
    """What the step is doing, in a few words."""
    reused: bool | None = None
    """true if the step's outputs were in the bucket already and no work was needed; otherwise absent."""
    updated: datetime
    """Time of this update."""
    commit: Commit = None
    """Commit of the code of the pod that serves this; empty if its image does not hold it. Absent in
    progress.json, and from older versions."""
    tokens: Amount | None = None
    """Tokens of this stage: trained on, and planned."""
    parts: Amount | None = None
    """Parts of the dataset or of the scores: written, and to write. For a sampler or teacher, windows: done,
    and known so far. For an export, files of the model;
    for init, of the weights."""
    tokens_per_second: float | None = None
    """Recent speed, padding excluded."""
    loss: float | None = None
    """What the stage minimises, in nats per token, reasoning and final weighted by spanWeights: the
    cross-entropy of the latest optimizer step, without confidence weights and teacher terms; in an OnPolicy
    stage the reverse KL over the latest window."""
    held_out: HeldOut | None = None
    """Held-out loss by span."""
    validity: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of sampled completions that are valid Harmony, over all efforts."""
    model: Address | None = None
    """s3:// URL of the folder with the model that the step has exported; absent before it is complete."""
    dataset: DatasetStatus | None = None
    """The dataset that the step wrote or read."""
    checkpoint: CheckpointStatus | None = None
    """The latest checkpoint."""
    conditions: tuple[ProgressCondition, ...] = ()
    """Conditions to add to the run's status."""

    def to_json(self) -> bytes:
        """JSON of at most PROGRESS_BYTES bytes. If it would be longer, conditions and the end of the message
        are left out."""
        whole = self.model_dump_json(by_alias=True, exclude_none=True).encode()
        if len(whole) <= PROGRESS_BYTES:
            return whole
        shorter = self.model_copy(update={"message": self.message[:1024], "conditions": ()})
        return shorter.model_dump_json(by_alias=True, exclude_none=True).encode()
