"""status: what has become of a run, as the operator writes it and kubectl shows it. Bounded in size.

How it is arrived at is the operator's business. To add a field, add it here and run `python -m vpmoe.api.crd`: the API server
drops what the CRD does not know.
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
"""Steps of a run at most: preprocess, and four of each of eight OnPolicy stages. With rescore there are fewer, for its stage has two."""


def _shortened(text: str) -> str:
    """A status that is too long would be refused as a whole, and the run would stand still for its own message."""
    return text if len(text) <= MESSAGE else text[: MESSAGE - 1] + "…"


def _rounded(number: float) -> float:
    """Four decimals, one from a hundred on: more would rewrite the status without telling anyone anything."""
    return round(number, 4 if abs(number) < 100 else 1)


Message = Annotated[str, AfterValidator(_shortened), Field(json_schema_extra={"maxLength": MESSAGE})]
Name = Annotated[str, Field(max_length=253)]
StepName = Annotated[str, Field(max_length=STEP_NAME)]
Number = Annotated[float, AfterValidator(_rounded)]


class Condition(Record):
    """One aspect of the run, as `kubectl wait --for=condition=…` reads it."""

    type: Annotated[str, Field(max_length=64, pattern=r"^[A-Z][A-Za-z0-9]*$")]
    """Ready, Progressing, Suspended, Stalled, Failed or Succeeded, or a name that a job gave, such as RouterCollapse."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Annotated[str, Field(max_length=128, pattern=r"^[A-Z][A-Za-z0-9]*$")]
    """Why, in one word for programs."""
    message: Message = ""
    """Why, in a sentence for people."""
    observed_generation: Count = 0
    """Generation of the DistillRun that this was found from."""
    last_transition_time: datetime
    """When its status last changed."""


class ChildRef(Record):
    """The object that carries out an attempt of a step."""

    kind: Annotated[str, Field(max_length=64)]
    """Job or PyTorchJob."""
    name: Name
    """Its name: <run>-<step>-a<attempt>."""
    uid: Annotated[str, Field(max_length=64)] | None = None
    """Its identity, once it has been made."""


class StepStatus(Record):
    """One step of the run: preprocess, rescore, or one of a stage's."""

    name: StepName
    """The step's name: preprocess, rescore, a stage's name for what trains it, or <stage>-sampler, <stage>-teacher, <stage>-evaluate."""
    state: StepState = "Pending"
    """Pending, Queued for GPUs, Running, Suspended, Retrying after a failure, Succeeded or Failed."""
    attempt: Count = 0
    """Number of the latest attempt, which is part of its child's name; 0 before the first. Resuming is an attempt too."""
    failures: Count = 0
    """Failures in a row without a new checkpoint, part or window. runtime.attempts of them fail the step."""
    interruptions: Count = 0
    """Times in a row, without a new checkpoint, part or window, that it was stopped from outside: evictions, drains. They do not count as
    failures."""
    tokens_done: Count | None = None
    """Tokens trained on."""
    tokens_total: Count | None = None
    """Tokens to train on."""
    parts_done: Count | None = None
    """Parts written, of the data set or of the scores; windows sampled or scored."""
    parts_total: Count | None = None
    """Parts to write, of the data set or of the scores; windows that are known to come."""
    reason: Annotated[str, Field(max_length=128)] = ""
    """What it is doing or why it is not, in one word for programs, as in the run's conditions: two steps may be at work at once."""
    message: Message = ""
    """What it is doing, or why it is not."""
    started: datetime | None = None
    """When its first attempt was made."""
    finished: datetime | None = None
    """When it succeeded or failed for good."""
    progressed: datetime | None = None
    """When it last got on. The run is Stalled runtime.stalledAfter later."""
    retry_at: datetime | None = None
    """When the next attempt is made, after a failure."""
    child: ChildRef | None = None
    """The object of the latest attempt."""
    checkpoint: CheckpointStatus | None = None
    """Its latest checkpoint."""
    held_out: HeldOut | None = None
    """Held-out loss by span before its first and after its latest evaluation, in nats a token."""
    validity: Number | None = None
    """Share of the completions sampled after its stage that are valid Harmony."""
    reused: bool = False
    """true where what it makes was in the bucket already and nothing had to be done."""


class RunProvenance(Record):
    """What the run was made by and from."""

    git_sha: Annotated[str, Field(max_length=64)] | None = None
    """Commit of this project."""
    image: Annotated[str, Field(max_length=512)] | None = None
    """Image of the training pods."""
    config_hash: Hash | None = None
    """sha256 of the resolved configuration, 64 hex."""
    dataset: DatasetStatus | None = None
    """The data set that it trains on."""
    folder: Address | None = None
    """s3:// address of the run's folder: configuration, metrics, checkpoints."""


class Status(Record):
    """What has become of the run. Written by the operator alone."""

    observed_generation: Count = 0
    """Generation of the DistillRun that this status was found from."""
    phase: RunPhase = "Pending"
    """Pending, Queued for GPUs, Running, Suspended, Succeeded or Failed."""
    message: Message = ""
    """What the run is doing, or what it waits for, in a sentence."""
    step: StepName | None = None
    """The step that is running or was last running; of several, the one that trains."""
    progress: Annotated[str, Field(max_length=32)] | None = None
    """How much of the whole run is done, such as "42%"."""
    tokens_per_second: Number | None = None
    """Speed of that step."""
    loss: Number | None = None
    """What the stage minimises, in nats a token, reasoning and final weighted by spanWeights: the cross-entropy of
    the latest optimizer step; in an OnPolicy stage the reverse KL over the latest window."""
    config: Annotated[str, Field(max_length=16)] | None = None
    """First 16 hex of the configuration's hash, as on the labels of everything that the run makes."""
    checkpoint: CheckpointStatus | None = None
    """The run's latest checkpoint."""
    held_out: HeldOut | None = None
    """Held-out loss by span of the training stage that is running or was last running, before and latest, in nats a token."""
    validity: Number | None = None
    """Share of the completions sampled after the latest stage that are valid Harmony."""
    started: datetime | None = None
    """When the first step started."""
    finished: datetime | None = None
    """When the run succeeded or failed."""
    conditions: Annotated[
        tuple[Condition, ...], Field(max_length=16, json_schema_extra={"listMapKey": "type"})
    ] = ()
    """Aspects of the run, each by its type."""
    steps: Annotated[
        tuple[StepStatus, ...], Field(max_length=MOST_STEPS, json_schema_extra={"listMapKey": "name"})
    ] = ()
    """Steps in the order in which they start; rescore runs beside Vanilla stages, and an OnPolicy stage's sampler and teacher beside it."""
    provenance: RunProvenance | None = None
    """What the run was made by and from."""

    def condition(self, kind: str) -> Condition | None:
        """The condition of that type, if it is there."""
        return next((condition for condition in self.conditions if condition.type == kind), None)

    @property
    def running(self) -> tuple[StepStatus, ...]:
        """The steps whose children are, or should be, alive."""
        return tuple(step for step in self.steps if step.state == "Running")

    @property
    def holds_gpus(self) -> bool:
        """Whether the run holds its GPUs: from its first child until it is suspended or finished.

        A pause between two attempts does not release them.
        """
        return self.phase == "Running"

    def failed_step(self, attempts: int) -> StepStatus | None:
        """The step whose failure ends the run, the first to fail if there are several; None if none has failed `attempts` times.

        Raising runtime.attempts makes a failed step one that may be retried.
        """
        failed = [step for step in self.steps if step.state == "Failed" and step.failures >= attempts]
        return min(failed, key=lambda step: step.finished.timestamp() if step.finished else 0.0, default=None)

    def step_status(self, step: str) -> StepStatus | None:
        """The status of the step of that name, if it is there."""
        return next((known for known in self.steps if known.name == step), None)
