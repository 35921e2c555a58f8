"""Progress of a step: the job writes it to steps/<step>/progress.json, and the operator copies it into
status.

It holds what the operator's decisions and the status need. All other measurements are in the metrics.
"""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from vpmoe.api.base import Record

Count = Annotated[int, Field(ge=0)]
Hash = Annotated[str, Field(max_length=64)]
Address = Annotated[str, Field(max_length=2048)]


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
    message: str = ""
    """Reason as a sentence."""


class Progress(Record):
    """Progress of one step. The object is overwritten with each update."""

    step: str
    """Name of the step."""
    attempt: Annotated[int, Field(ge=1)]
    """Number of the attempt that wrote this."""
    state: Literal["Running", "Succeeded"]
    """Succeeded is written once, when all outputs of the step are in the bucket. A failure is reported by the
    pod's exit code and not here."""
    message: str = ""
    """What the step is doing, in a few words."""
    updated: datetime
    """Time of this update."""
    tokens: Amount | None = None
    """Tokens of this stage: trained on, and planned."""
    parts: Amount | None = None
    """Parts of the dataset or of the scores: written, and to write. For a sampler or teacher, windows: done,
    and known so far."""
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
    dataset: DatasetStatus | None = None
    """The dataset that the step wrote or read."""
    checkpoint: CheckpointStatus | None = None
    """The latest checkpoint."""
    conditions: tuple[ProgressCondition, ...] = ()
    """Conditions to add to the run's status."""
