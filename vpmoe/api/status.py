"""status: the state of a run, written by the operator and shown by kubectl. Its size is bounded.

To add a field, add it here and run `make manifests`: the API server drops fields that the CRD does not have.
"""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

from vpmoe.api.base import Record
from vpmoe.api.progress import Address, CheckpointStatus, Count, DatasetStatus, Hash, HeldOut
from vpmoe.api.run import STEP_NAME, needs_gpus
from vpmoe.api.runtime import RuntimeSpec

RunPhase = Literal["Pending", "Queued", "Running", "Suspended", "Succeeded", "Failed"]
StepState = Literal["Pending", "Queued", "Running", "Suspended", "Retrying", "Succeeded", "Failed"]
ConditionType = Literal["Ready", "Progressing", "Suspended", "Stalled", "Failed", "Succeeded"]

MESSAGE = 1024
"""Longest message in a status, in characters."""
INTERRUPTIONS_EXHAUSTED = "InterruptionsExhausted"
"""Reason of a step that has failed because it was interrupted runtime.interruptions times in a row."""
MAX_IMAGES = 8
"""Most images of a step that a status keeps."""
MAX_IMAGE, MAX_DIGEST = 512, 160
"""Longest reference and digest of an image in a status, in characters."""
MOST_STEPS = 50
"""Most steps of a run: init, preprocess, four in each of eight OnPolicy stages, and an export and a report of
each. A run with rescore has fewer, because a Rescored stage has two, an export and a report."""


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


class StatusRecord(Record):
    """Base of the parts of a status. Unknown fields stay as long as the part does: an operator of an older
    version must not delete what a newer one has written."""

    model_config = ConfigDict(extra="allow")


class Condition(StatusRecord):
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


class ChildRef(StatusRecord):
    """The object that runs an attempt of a step."""

    kind: Annotated[str, Field(max_length=64)]
    """Job or PyTorchJob."""
    name: Name
    """Name of the object: <run>-<step>-a<attempt>."""
    uid: Annotated[str, Field(max_length=64)] | None = None
    """Uid of the object; absent until it has been created."""


class AttemptOutcome(StatusRecord):
    """How an attempt ended while pods of it still exist."""

    result: Literal["Succeeded", "Permanent", "Interrupted", "Retriable", "Error"]
    """Succeeded, or the kind of the failure: Permanent, Interrupted, Retriable or Error."""
    message: Message = ""
    """The outcome as a sentence."""


class StepImage(StatusRecord):
    """An image that pods of a step ran, and the attempts that did. It is that of the container of the job
    itself."""

    first_attempt: Count
    """Number of the first attempt that ran it."""
    last_attempt: Count
    """Number of the last attempt that ran it. All attempts between the two did, or left no pod that could be
    read."""
    image: Annotated[str, Field(max_length=MAX_IMAGE)]
    """Reference of the image in the pods."""
    digest: Annotated[str, Field(max_length=MAX_DIGEST)] | None = None
    """Digest of the image as the node reports it, such as sha256:…. Absent if the node reports none."""
    commit: Annotated[str, Field(max_length=64)] | None = None
    """Commit of this project that the pods reported. Empty if the image does not hold its commit. Absent if
    no pod has reported, or if they are of an older version."""


class StepStatus(StatusRecord):
    """Status of one step: init, preprocess, rescore, or a step of a stage."""

    name: StepName
    """Name of the step: init, preprocess, rescore, the stage's name for its training step, or
    <stage>-sampler, <stage>-teacher, <stage>-validity, <stage>-evaluate, <stage>-export,
    <stage>-report."""
    state: StepState = "Pending"
    """Pending, Queued for GPUs, Running, Suspended, Retrying after a failure, Succeeded or Failed."""
    attempt: Count = 0
    """Number of the latest attempt, which is part of the child's name; 0 before the first. A resume is an
    attempt too."""
    failures: Count = 0
    """Consecutive failures without a new checkpoint, part or window. The step fails at runtime.attempts
    failures."""
    interruptions: Count = 0
    """Consecutive interruptions from outside, such as drains and lost nodes, without a new checkpoint, part
    or window. They do not count as failures. The step fails at runtime.interruptions interruptions."""
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
    True. After two attempts in a row without a new checkpoint, part or window, only such a one is
    progress."""
    unreadable_since: datetime | None = None
    """Time since when the step's progress cannot be read from its pods; absent while it can. This time does
    not count for runtime.stalledAfter."""
    retry_at: datetime | None = None
    """Time of the next attempt after a failure."""
    child: ChildRef | None = None
    """The object of the latest attempt."""
    resumed: datetime | None = None
    """Time when the latest attempt's PyTorchJob was last resumed by Kueue, as of when all of its pods ran;
    absent if it was not."""
    outcome: AttemptOutcome | None = None
    """How the latest attempt ended, while its pods are being removed; otherwise absent."""
    checkpoint: CheckpointStatus | None = None
    """The step's latest checkpoint."""
    furthest: Count | None = None
    """Optimizer step of the step's furthest checkpoint; absent if that is the latest one. Only a checkpoint
    beyond it resets failures and interruptions."""
    held_out: HeldOut | None = None
    """Held-out loss by span before the first optimizer step and at the latest evaluation, in nats per
    token."""
    validity: Number | None = None
    """Share of the completions sampled after the stage that are valid Harmony."""
    model: Address | None = None
    """s3:// URL of the folder with the model that the step has exported."""
    reused: bool = False
    """true if the step's outputs were already in the bucket and no work was needed."""
    images: Annotated[tuple[StepImage, ...], Field(max_length=MAX_IMAGES)] | None = None
    """What the step's attempts ran, in order: one entry as long as it was the same, another one after an
    upgrade. Two entries with the same attempt: its pods ran different images. The latest eight are kept.
    Absent until pods have started."""

    def is_final(self, runtime: RuntimeSpec) -> bool:
        """Whether the step has failed and the limit that it reached has not been raised since."""
        if self.reason == INTERRUPTIONS_EXHAUSTED:
            return self.state == "Failed" and self.interruptions >= runtime.interruptions
        return self.state == "Failed" and self.failures >= runtime.attempts


class RunProvenance(StatusRecord):
    """The code, configuration and data of the run."""

    git_sha: Annotated[str, Field(max_length=64)] | None = None
    """Only of a run that an older version has started: the commit that its operator was told then. What ran
    is in steps[].images."""
    image: Annotated[str, Field(max_length=512)] | None = None
    """Only of a run that an older version has started: image of its training pods at that time."""
    config_hash: Hash | None = None
    """SHA-256 of the resolved configuration, 64 hex digits."""
    dataset: DatasetStatus | None = None
    """The dataset of the run."""
    folder: Address | None = None
    """s3:// URL of the run's folder: configuration, metrics, checkpoints."""


class Status(StatusRecord):
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
    eta: Annotated[str, Field(max_length=20)] | None = None
    """When the run will have trained and evaluated all of its stages, about, in UTC to the minute, such as
    2026-11-30T04:10Z: at the present speed, and for later stages by the plan, times the factor by which the
    present one is slower than planned. Absent if that is not known, and while no stage has trained."""
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
    model: Address | None = None
    """s3:// URL of the folder with the exported model, for transformers and vLLM; that of the latest stage if
    several are exported."""
    started: datetime | None = None
    """Time when the first step started."""
    finished: datetime | None = None
    """Time when the run succeeded or failed."""
    clearing: datetime | None = None
    """Time since when the folder of a deleted run is being deleted from the bucket; absent before."""
    conditions: Annotated[
        tuple[Condition, ...], Field(max_length=16, json_schema_extra={"listMapKey": "type"})
    ] = ()
    """Conditions of the run by type."""
    steps: Annotated[
        tuple[StepStatus, ...], Field(max_length=MOST_STEPS, json_schema_extra={"listMapKey": "name"})
    ] = ()
    """Steps in the order in which they start. init runs beside preprocess, rescore beside Vanilla stages; the
    sampler and teacher of an OnPolicy stage run beside its training step."""
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
    def gpu_step_started(self) -> bool:
        """Whether a step that needs GPUs has started."""
        return any(step.attempt and needs_gpus(step.name) for step in self.steps)

    @property
    def gpu_steps_finished(self) -> bool:
        """Whether all steps that need GPUs have succeeded: at most exports are left."""
        left = any(needs_gpus(step.name) and step.state != "Succeeded" for step in self.steps)
        return self.gpu_step_started and not left

    @property
    def holds_gpus(self) -> bool:
        """Whether the run holds its GPUs: from its first step that needs them until the last one has
        succeeded, or the run is suspended or finished.

        A pause between two attempts does not release them.
        """
        return self.phase == "Running" and self.gpu_step_started and not self.gpu_steps_finished

    def failed_step(self, runtime: RuntimeSpec) -> StepStatus | None:
        """The step whose failure ends the run, the first to fail if there are several; None if none has
        failed for good.

        Raising runtime.attempts or runtime.interruptions makes a failed step one that may be retried.
        """
        failed = [step for step in self.steps if step.is_final(runtime)]
        return min(failed, key=lambda step: step.finished.timestamp() if step.finished else 0.0, default=None)

    def step_status(self, step: str) -> StepStatus | None:
        """The status of the step with that name, or None."""
        return next((known for known in self.steps if known.name == step), None)
