"""Where a stage stands: everything beside weights and optimizer that a resumed attempt must know, and where checkpoints say it.

No torch here: the launcher looks before it starts anything. The weights are restore.py's business.
"""

from pydantic import ConfigDict, Field, ValidationError

from vpmoe.api.base import Record
from vpmoe.api.progress import CheckpointStatus, HeldOut, SpanLoss
from vpmoe.storage import Bucket, StorageError, manifest, paths
from vpmoe.storage.manifest import Manifest


class ScoredStream(Record):
    """Where a stage stands among the documents that the teacher has scored."""

    model_config = ConfigDict(extra="forbid")

    scores: str
    """Id of the scores: of others this is no position."""
    first_sequence: int
    """Sequence of the scored documents' stream that the stage began with."""
    next_sequence: int
    """Sequence of it that comes next, in this stage or in a later one with the same scores."""


class ConfidenceCentre(Record):
    """What a Rescored stage weighs by: the teacher's log-probability that weighs 1, in nats, by span."""

    model_config = ConfigDict(extra="forbid")

    reasoning: float
    final: float


class WindowStats(Record):
    """What the windows since the evaluation before came to."""

    model_config = ConfigDict(extra="forbid")

    rollouts: int = 0
    valid: int = 0
    """Of the rollouts, those that are valid Harmony."""
    gap: dict[str, float] = Field(default_factory=dict)
    """By span, the sum over sampled tokens of the student's log-probability less the teacher's."""
    tokens: dict[str, int] = Field(default_factory=dict)
    """By span, the sampled tokens."""


class WindowStream(Record):
    """Where a stage stands among the windows of what the student itself samples."""

    model_config = ConfigDict(extra="forbid")

    first_prompt: int
    """Prompts that the stages before have used."""
    next_prompt: int
    """Prompts used so far; an OnPolicy stage that follows begins there."""
    trained: int = 0
    """Windows of the stage that have been trained. In the steps of the stage behind a position each was trained once."""
    digest: str = ""
    """sha256 (hex) over the files of all windows trained: of the digest before, the rollouts' sha256 and the scores', one after another."""
    beyond: int = 0
    """Windows in a row, the latest among them, whose KL(sampler‖trainer) was above maxSamplerKl."""
    since: WindowStats = WindowStats()
    reverse_kl: tuple[float, ...] = ()
    """At each evaluation of the stage, spans weighted: the estimate of KL(student‖teacher) over the windows since the one before."""
    validity: float = 0.0
    """At the latest evaluation: share of valid rollouts since the one before."""


class TrainState(Record):
    """A stage after some of its optimizer steps. Data order follows from it alone, so there is no data state to keep."""

    model_config = ConfigDict(extra="forbid")

    stage: str
    """The stage's name."""
    steps: int
    """Optimizer steps of the stage."""
    tokens: int
    """Positions of the stage that entered the student, padding excluded."""
    iteration: int
    """Optimizer steps over all stages: the checkpoint's name, and what Adam's bias correction counts."""
    first_sequence: int
    """Sequence of the training stream that the stage began with: the one after the last of the stage before."""
    next_sequence: int
    """Sequence that comes next; the stage that follows begins there."""
    epoch: int
    """Pass over the data that next_sequence lies in."""
    before: SpanLoss | None = None
    """Held-out loss before the stage's first step."""
    latest: SpanLoss | None = None
    """Held-out loss of the latest evaluation."""
    held_out: tuple[float, ...] = ()
    """Held-out loss before the first step and of each evaluation, spans weighted; what `stop` looks at."""
    finished: bool = False
    """Whether the stage is done. Only then may the next begin from here."""
    scored: ScoredStream | None = None
    """Where the scored documents stand; None where no stage so far has read any."""
    windows: WindowStream | None = None
    """Where the windows stand; None where no stage so far was OnPolicy."""
    objective: ConfidenceCentre | None = None
    """State of the objective, fixed when the stage begins. Only Rescored has one."""


def iterations(bucket: Bucket, folder: str) -> list[int]:
    """The checkpoints of a stage that exist, newest first."""
    names = [found.key.removeprefix(folder + "/") for found in bucket.list(folder + "/")]
    return sorted(
        (int(name.removesuffix("/manifest.json")) for name in names if name.endswith("/manifest.json")),
        reverse=True,
    )


def end_of(bucket: Bucket, folder: str) -> tuple[Manifest, TrainState] | None:
    """The newest checkpoint of a stage, if it is the stage's end; None where the stage has not finished, or its manifest is damaged."""
    for iteration in iterations(bucket, folder)[:1]:
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


def held_out(position: TrainState) -> HeldOut | None:
    """The held-out losses as progress.json has them; None where none is measured."""
    return HeldOut(before=position.before, latest=position.latest) if position.latest else None


def facts_of(bucket: Bucket, found: Manifest, position: TrainState) -> CheckpointStatus:
    """A checkpoint as progress.json names it."""
    return CheckpointStatus(
        iteration=position.iteration,
        tokens=position.tokens,
        manifest=bucket.url(found.key),
        sha256=found.sha256,
    )
