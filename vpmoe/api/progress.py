"""What a step says about itself: the job writes it to steps/<step>/progress.json, the operator reads it from there into status.

It holds what the operator decides by and what a user watches; everything measured goes into the metrics beside it.
"""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from vpmoe.api.base import Record

Count = Annotated[int, Field(ge=0)]
Hash = Annotated[str, Field(max_length=64)]
Address = Annotated[str, Field(max_length=2048)]


class Amount(Record):
    """How much of something is done."""

    done: Count
    """Done so far."""
    total: Count
    """All of it, as far as is known."""


class SpanLoss(Record):
    """Mean negative log-likelihood by span, in nats a token; None where there was no such token."""

    reasoning: float | None = None
    """Of reasoning tokens."""
    final: float | None = None
    """Of final answers."""


class HeldOut(Record):
    """Held-out loss of the step."""

    before: SpanLoss | None = None
    """Before its first optimizer step."""
    latest: SpanLoss | None = None
    """At the latest evaluation."""


class DatasetStatus(Record):
    """The data set that the step made or read."""

    id: Hash
    """Its id, 64 hex."""
    manifest: Address
    """s3:// address of its manifest."""
    sha256: Hash
    """sha256 of the manifest's bytes, 64 hex."""


class CheckpointStatus(Record):
    """The latest checkpoint whose manifest is in the bucket."""

    iteration: Count
    """Optimizer steps done, over all stages."""
    tokens: Count
    """Tokens of the stage done."""
    manifest: Address
    """s3:// address of its manifest."""
    sha256: Hash
    """sha256 of the manifest's bytes, 64 hex."""


class ProgressCondition(Record):
    """Something that the job found and the run's status should say, such as RouterCollapse."""

    type: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z0-9]{0,63}$")]
    """Its name in CamelCase."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z0-9]{0,127}$")]
    """Why, in one CamelCase word."""
    message: str = ""
    """Why, in a sentence."""


class Progress(Record):
    """State of one step, overwritten as it goes on."""

    step: str
    """Which step of the run."""
    attempt: Annotated[int, Field(ge=1)]
    """Which attempt wrote this."""
    state: Literal["Running", "Succeeded"]
    """Succeeded is written once, when everything that the step makes is in the bucket. Failures are the pod's to report."""
    message: str = ""
    """What it is doing, in a few words."""
    updated: datetime
    """When this was written."""
    tokens: Amount | None = None
    """Tokens trained on in this stage, and planned."""
    parts: Amount | None = None
    """Parts written and to write, of the data set or of the scores; windows sampled or scored, and those that are known to be."""
    tokens_per_second: float | None = None
    """Speed over the last while, padding excluded."""
    loss: float | None = None
    """What the stage minimises, in nats a token, reasoning and final weighted by spanWeights: the cross-entropy of
    the latest optimizer step, without confidence weights and teacher terms; in an OnPolicy stage the reverse KL
    over the latest window."""
    held_out: HeldOut | None = None
    """Held-out loss by span."""
    validity: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of sampled completions that are valid Harmony, of all efforts."""
    dataset: DatasetStatus | None = None
    """The data set that the step made or read."""
    checkpoint: CheckpointStatus | None = None
    """The latest checkpoint."""
    conditions: tuple[ProgressCondition, ...] = ()
    """What the run's status should say beside it."""
