"""status: the state of a run, written by the operator and shown by kubectl. Its size is bounded.

To add a field, add it here and run `make manifests`: the API server drops fields that the CRD does not have.
"""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from vpmoe.api.base import Record
from vpmoe.api.progress import Address, CheckpointStatus, Count, DatasetStatus, Hash, HeldOut
from vpmoe.api.run import STEP_NAME

RunPhase = Literal["Pending", "Queued", "Running", "Suspended", "Succeeded", "Failed"]
StepState = Literal["Pending", "Queued", "Running", "Suspended", "Retrying", "Succeeded", "Failed"]
ConditionType = Literal["Ready", "Progressing", "Suspended", "Stalled", "Failed", "Succeeded"]

MESSAGE = 1024
"""Longest message in a status, in characters."""
MOST_STEPS = 33
"""Most steps of a run: preprocess, and four in each of eight OnPolicy stages. A run with rescore has fewer,
because a Rescored stage has two."""


def _shortened(text: str) -> str:
    """The text cut to MESSAGE characters: the API server rejects the whole status if one message is too
    long."""
    return text if len(text) <= MESSAGE else text[: MESSAGE - 1] + "…"


def _rounded(number: float) -> float:
    """The number with four decimals, or one from 100 on, so that noise does not cause status updates."""
    return round(number, 4 if abs(number) < 100 else 1)


Message = Annotated[str, AfterValidator(_shortened), Field(json_schema_extra={"maxLength": MESSAGE})]
Name = Annotated[str, Field(max_length=253)]
StepName = Annotated[str, Field(max_length=STEP_NAME)]
Number = Annotated[float, AfterValidator(_rounded)]


class Condition(Record):
    """One aspect of the run, as `kubectl wait --for=condition=…` reads it."""

    type: Annotated[str, Field(max_length=64, pattern=r"^[A-Z][A-Za-z0-9]*$")]
    """Ready, Progressing, Suspended, Stalled, Failed or Succeeded, or a condition from a job, such as
    RouterCollapse."""
    status: Literal["True", "False", "Unknown"]
    """Whether the condition holds."""
    reason: Annotated[str, Field(max_length=128, pattern=r"^[A-Z][A-Za-z0-9]*$")]
    """Reason as one CamelCase word, for programs."""
    message: Message = ""
    """Reason as a sentence, for people."""
    observed_generation: Count = 0
    """Generation of the DistillRun that the condition was computed from."""
    last_transition_time: datetime
    """Time of the last change of the condition's status."""


class ChildRef(Record):
    """The object that runs an attempt of a step."""

    kind: Annotated[str, Field(max_length=64)]
    """Job or PyTorchJob."""
    name: Name
    """Name of the object: <run>-<step>-a<attempt>."""
    uid: Annotated[str, Field(max_length=64)] | None = None
    """Uid of the object; absent until it has been created."""


class StepStatus(Record):
    """Status of one step: preprocess, rescore, or a step of a stage."""

    name: StepName
    """Name of the step: preprocess, rescore, the stage's name for its training step, or <stage>-sampler,
    <stage>-teacher, <stage>-evaluate."""
    state: StepState = "Pending"
    """Pending, Queued for GPUs, Running, Suspended, Retrying after a failure, Succeeded or Failed."""
    attempt: Count = 0
    """Number of the latest attempt, which is part of the child's name; 0 before the first. A resume is an
    attempt too."""
    failures: Count = 0
    """Consecutive failures without a new checkpoint, part or window. The step fails at runtime.attempts
    failures."""
    interruptions: Count = 0
    """Consecutive interruptions from outside, such as evictions and drains, without a new checkpoint, part or
    window. They do not count as failures."""
    tokens_done: Count | None = None
    """Tokens trained on."""
    tokens_total: Count | None = None
    """Tokens to train on."""
    parts_done: Count | None = None
    """Parts of the dataset or of the scores written; for a sampler or teacher, windows done."""
    parts_total: Count | None = None
    """Parts of the dataset or of the scores to write; for a sampler or teacher, windows known so far."""
    reason: Annotated[str, Field(max_length=128)] = ""
    """What the step is doing, or why it is not running, as one word for programs, as in the run's
    conditions."""
    message: Message = ""
    """What the step is doing, or why it is not running, as a sentence."""
    started: datetime | None = None
    """Time when the first attempt was created."""
    finished: datetime | None = None
    """Time when the step succeeded or failed permanently."""
    progressed: datetime | None = None
    """Time of the last progress. After runtime.stalledAfter without progress the run's condition Stalled is
    True."""
    retry_at: datetime | None = None
    """Time of the next attempt after a failure."""
    child: ChildRef | None = None
    """The object of the latest attempt."""
    checkpoint: CheckpointStatus | None = None
    """The step's latest checkpoint."""
    held_out: HeldOut | None = None
    """Held-out loss by span before the first optimizer step and at the latest evaluation, in nats per
    token."""
    validity: Number | None = None
    """Share of the completions sampled after the stage that are valid Harmony."""
    reused: bool = False
    """true if the step's outputs were already in the bucket and no work was needed."""


class RunProvenance(Record):
    """The code, configuration and data of the run."""

    git_sha: Annotated[str, Field(max_length=64)] | None = None
    """Commit of this project."""
    image: Annotated[str, Field(max_length=512)] | None = None
    """Image of the training pods."""
    config_hash: Hash | None = None
    """SHA-256 of the resolved configuration, 64 hex digits."""
    dataset: DatasetStatus | None = None
    """The dataset of the run."""
    folder: Address | None = None
    """s3:// URL of the run's folder: configuration, metrics, checkpoints."""


class Status(Record):
    """State of the run. Only the operator writes it."""

    observed_generation: Count = 0
    """Generation of the DistillRun that the status was computed from."""
    phase: RunPhase = "Pending"
    """Pending, Queued for GPUs, Running, Suspended, Succeeded or Failed."""
    message: Message = ""
    """What the run is doing or waiting for, as a sentence."""
    step: StepName | None = None
    """The step that is running or ran last; if several run, the one that trains."""
    progress: Annotated[str, Field(max_length=32)] | None = None
    """Share of the whole run that is done, such as "42%"."""
    tokens_per_second: Number | None = None
    """Tokens per second of that step, padding excluded."""
    loss: Number | None = None
    """What the stage minimises, in nats per token, reasoning and final weighted by spanWeights: the
    cross-entropy of the latest optimizer step; in an OnPolicy stage the reverse KL over the latest window."""
    config: Annotated[str, Field(max_length=16)] | None = None
    """First 16 hex digits of the configuration's hash, as in the label of all objects of the run."""
    checkpoint: CheckpointStatus | None = None
    """The run's latest checkpoint."""
    held_out: HeldOut | None = None
    """Held-out loss by span of the stage that is training or trained last, in nats per token."""
    validity: Number | None = None
    """Share of the completions sampled after the latest stage that are valid Harmony."""
    started: datetime | None = None
    """Time when the first step started."""
    finished: datetime | None = None
    """Time when the run succeeded or failed."""
    conditions: Annotated[
        tuple[Condition, ...], Field(max_length=16, json_schema_extra={"listMapKey": "type"})
    ] = ()
    """Conditions of the run by type."""
    steps: Annotated[
        tuple[StepStatus, ...], Field(max_length=MOST_STEPS, json_schema_extra={"listMapKey": "name"})
    ] = ()
    """Steps in the order in which they start. rescore runs beside Vanilla stages; the sampler and teacher of
    an OnPolicy stage run beside its training step."""
    provenance: RunProvenance | None = None
    """The code, configuration and data of the run."""

    def condition(self, kind: str) -> Condition | None:
        """The condition of that type, or None."""
        return next((condition for condition in self.conditions if condition.type == kind), None)

    @property
    def running(self) -> tuple[StepStatus, ...]:
        """The steps in state Running."""
        return tuple(step for step in self.steps if step.state == "Running")

    @property
    def holds_gpus(self) -> bool:
        """Whether the run holds its GPUs: from its first child until it is suspended or finished.

        A pause between two attempts does not release them.
        """
        return self.phase == "Running"

    def failed_step(self, attempts: int) -> StepStatus | None:
        """The step whose failure ends the run, the first to fail if there are several; None if none has
        failed `attempts` times.

        Raising runtime.attempts makes a failed step one that may be retried.
        """
        failed = [step for step in self.steps if step.state == "Failed" and step.failures >= attempts]
        return min(failed, key=lambda step: step.finished.timestamp() if step.finished else 0.0, default=None)

    def step_status(self, step: str) -> StepStatus | None:
        """The status of the step with that name, or None."""
        return next((known for known in self.steps if known.name == step), None)
