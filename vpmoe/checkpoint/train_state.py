"""The train state of a stage: all that a resumed attempt needs besides weights and optimizer. Stored in each
checkpoint's manifest.

The manifest's key is "position". No torch here: the launcher reads the state before it starts a process.
Weights are in format.py.
"""

import math
import re
from operator import not_
from typing import Literal

from pydantic import ConfigDict, Field, ValidationError

from vpmoe.api.base import Record
from vpmoe.api.microbatch import Microbatch
from vpmoe.api.progress import CheckpointStatus, HeldOut, SpanLoss
from vpmoe.storage import Bucket, StorageError, manifest, paths
from vpmoe.storage.manifest import Manifest


class ScoredStream(Record):
    """Position of a stage in the stream of documents that the teacher scored."""

    model_config = ConfigDict(extra="forbid")

    scores: str
    """Id of the scores. The position is valid for these only."""
    first_sequence: int
    """Sequence of the stream that the stage began with."""
    next_sequence: int
    """Next sequence of the stream, for this stage or a later one with the same scores."""


class ConfidenceCentre(Record):
    """The teacher's log-probability, in nats by span, at which a token of a Rescored stage has weight 1."""

    model_config = ConfigDict(extra="forbid")

    reasoning: float
    final: float


class WindowStats(Record):
    """Statistics of the windows since the previous evaluation."""

    model_config = ConfigDict(extra="forbid")

    rollouts: int = 0
    valid: int = 0
    """Rollouts that are valid Harmony."""
    gap: dict[str, float] = Field(default_factory=dict)
    """By span, the sum over sampled tokens of the student's minus the teacher's log-probability."""
    tokens: dict[str, int] = Field(default_factory=dict)
    """Sampled tokens by span."""


class WindowStream(Record):
    """Position of a stage in the stream of windows that the student samples."""

    model_config = ConfigDict(extra="forbid")

    first_prompt: int
    """Prompts used by earlier stages."""
    next_prompt: int
    """Prompts used so far; the next OnPolicy stage begins there."""
    trained: int = 0
    """Windows of the stage that have been trained, each exactly once."""
    digest: str = ""
    """sha256 (hex) chain over all windows trained: of the previous digest, the rollouts' sha256 and the
    scores' sha256."""
    beyond: int = 0
    """Number of consecutive windows, up to the latest, whose KL(sampler‖trainer) was above maxSamplerKl."""
    since: WindowStats = WindowStats()
    reverse_kl: tuple[float, ...] = ()
    """Per evaluation of the stage, the span-weighted estimate of KL(student‖teacher) over the windows since
    the previous one."""
    validity: float = 0.0
    """Share of valid rollouts between the latest evaluation and the one before."""


class CheckpointValidity(Record):
    """The validity of a checkpoint of the stage, measured beside the training."""

    model_config = ConfigDict(extra="forbid")

    iteration: int
    """The checkpoint."""
    share: float
    """Share of its completions that are valid Harmony."""


Figure = float | Literal["nan", "inf", "-inf"]
"""A number that need not be finite, as JSON can say it."""


def figure(value: float) -> Figure:
    """The number as a Figure."""
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


class StepBatch(Record):
    """What a step read, all ranks together."""

    model_config = ConfigDict(extra="forbid")

    documents: dict[str, tuple[int, ...]]
    """By part of the dataset's split, the numbers of its documents in the part, from 0, ascending. Of a
    window: those whose prompts it answers."""
    first_sequence: int | None = None
    """The first of its packed sequences in the stream that the step reads; rank r has the r-th share of
    them. None of a window."""
    sequences: int | None = None
    """How many. None of a window."""
    window: int | None = None
    """Number of the window. None of any other step."""


class SkippedStep(Record):
    """A step of which the loss or the gradient was not finite. Its data count as read; the weights did not
    move."""

    model_config = ConfigDict(extra="forbid")

    step: int
    """Number among the stage's steps, from 1."""
    number: int
    """Number among the stage's skipped steps, from 1."""
    kind: str
    """How it would have trained: a name of api.stages.KINDS."""
    tokens: int
    """Tokens of its batch, padding excluded."""
    loss: Figure
    """Over all ranks."""
    loss_by_rank: tuple[Figure, ...]
    """What each rank added to it. All finite if the gradient alone was not."""
    gradient_norm: Figure
    """Over all ranks."""
    batch: StepBatch


SKIPPED_KEPT = 16
"""Skipped steps of which a train state says what they read. The metrics have all of them."""


class TrainState(Record):
    """A stage after some of its optimizer steps. It determines the data order, so no data state is kept."""

    model_config = ConfigDict(extra="forbid")

    stage: str
    """The stage's name."""
    steps: int
    """Optimizer steps of the stage."""
    tokens: int
    """Tokens of the stage that the student has processed, excluding padding."""
    iteration: int
    """Optimizer steps over all stages, skipped ones included: the checkpoint's name."""
    skipped_iterations: int = Field(default=0, exclude_if=not_)
    """Those of `iteration` that were skipped. Not written if there are none, as the next field: older
    versions reject a state with fields that they do not know."""
    skipped: tuple[SkippedStep, ...] = Field(default=(), exclude_if=not_)
    """The latest skipped steps of the stage, at most SKIPPED_KEPT."""
    first_sequence: int
    """Sequence of the training stream that the stage began with, after the last one of the previous stage."""
    next_sequence: int
    """Next sequence; the next stage begins there."""
    epoch: int
    """Epoch of next_sequence."""
    before: SpanLoss | None = None
    """Held-out loss before the stage's first step."""
    latest: SpanLoss | None = None
    """Held-out loss of the latest evaluation."""
    held_out: tuple[float, ...] = ()
    """Span-weighted held-out loss before the first step and at each evaluation; `stop` is decided from it."""
    validity: CheckpointValidity | None = None
    """What the latest evaluation knew of the stage's validity; `stop` is decided from it. None if nothing was
    measured, and in an OnPolicy stage, whose own rollouts are in `windows`."""
    finished: bool = False
    """Whether the stage is complete. The next stage may begin only from a finished one."""
    scored: ScoredStream | None = None
    """None if no stage so far has read scored documents."""
    windows: WindowStream | None = None
    """None if no stage so far was OnPolicy."""
    microbatch: Microbatch | None = None
    """How the stage divides a rank's sequences, chosen when it began, so that another card changes no sum.
    None in checkpoints of earlier versions, and of initial weights."""
    objective: ConfidenceCentre | None = None
    """State of the objective, fixed when the stage begins; only for Rescored."""

    @property
    def updates(self) -> int:
        """Optimizer steps over all stages that moved the weights: the count for Adam's bias correction."""
        return self.iteration - self.skipped_iterations

    @property
    def skipped_in_a_row(self) -> int:
        """How many of the stage's latest steps, without one between them that was not, were skipped."""
        count = 0
        for one in reversed(self.skipped):
            if one.step != self.steps - count:
                break
            count += 1
        return count


def initial_state(stage: str) -> TrainState:
    """The state in which a run's first stage begins."""
    return TrainState(stage=stage, steps=0, tokens=0, iteration=0, first_sequence=0, next_sequence=0, epoch=0)


def list_iterations(bucket: Bucket, folder: str) -> list[int]:
    """Iterations of the stage's checkpoints, newest first. Other objects in the folder are ignored."""
    names = (found.key.removeprefix(folder + "/") for found in bucket.list(folder + "/"))
    found = (
        iteration_of(name.removesuffix("/manifest.json")) for name in names if name.endswith("/manifest.json")
    )
    return sorted((one for one in found if one is not None), reverse=True)


def iteration_of(name: str) -> int | None:
    """The iteration of a checkpoint's folder; None if no job gives a folder this name."""
    return int(name) if re.fullmatch(r"0|[1-9][0-9]{0,11}", name) else None


def load_stage_end(bucket: Bucket, folder: str) -> tuple[Manifest, TrainState] | None:
    """The newest checkpoint of a stage if the stage has finished; None if it has not, or if the manifest is
    damaged."""
    for iteration in list_iterations(bucket, folder)[:1]:
        try:
            found = manifest.load(bucket, paths.manifest(f"{folder}/{iteration}"))
            position = TrainState.model_validate(found.facts.get("position"))
        except ValidationError:
            return None
        except StorageError as error:
            if error.reason != "Altered":
                raise
            return None
        if position.finished:
            return found, position
    return None


def held_out_losses(position: TrainState) -> HeldOut | None:
    """The held-out losses for progress.json; None if none was measured."""
    return HeldOut(before=position.before, latest=position.latest) if position.latest else None


def checkpoint_facts(bucket: Bucket, found: Manifest, position: TrainState) -> CheckpointStatus:
    """A checkpoint's entry in progress.json."""
    return CheckpointStatus(
        iteration=position.iteration,
        tokens=position.tokens,
        manifest=bucket.url(found.key),
        sha256=found.sha256,
    )
