"""Decisions about one step that has a child: what its child and its progress report imply.

Part of plan(), and as pure.

What the steps imply for the run as a whole is in run_status.py.
"""

from datetime import timedelta
from typing import Any

from distill_operator.actions import CreateChild, DeleteChild
from distill_operator.kube import PYTORCHJOB
from distill_operator.observe import NameConflict, ObservedChild
from distill_operator.plan_builder import StepContext
from distill_operator.pod_diagnosis import Failure
from distill_operator.settings import Settings
from vpmoe.api.status import ChildRef, RunPhase, RunProvenance, StepStatus

REUSED = "Reused"
"""The progress message of a step that found all of its output in the bucket already."""


def record_outcome(context: StepContext) -> None:
    """Merge the progress of a Running step, and record its outcome if it has ended.

    Otherwise it stays Running.
    """
    _merge_progress(context)
    step, child, progress = context.step, context.observation.child, context.reading.progress
    if backend_unavailable(context) or context.observation.name_conflict is not None:
        return
    if child is None:
        if progress is not None and progress.state == "Succeeded" and progress.attempt == step.attempt:
            _succeed(context)
        elif context.run.spec.suspend or step.reason == "Stopping":
            context.update(state="Suspended")  # the operator deleted the child
        elif step.child is None or step.child.uid is not None:  # without a uid it was never created
            name = f"{step.child.kind} {step.child.name}" if step.child else "its child"
            _fail(context, Failure("Interrupted", f"{name} was deleted"))
    elif child.state == "Succeeded":
        _succeed(context)
    elif child.state == "Failed" and child.failure is not None:
        _fail(context, child.failure)


def monitor(context: StepContext) -> None:
    """A step that is Running and has not ended: create its child if it does not exist, and summarize its
    state.
    """
    observation = context.observation
    if backend_unavailable(context):
        report_missing_backend(context, "Running")
    elif observation.name_conflict is not None:
        _report_name_conflict(context, observation.name_conflict)
    elif observation.child is None:
        _create_child(context, observation.create_error)
    elif observation.child.state == "Succeeded":
        _wait_for_result(context)
    elif observation.child.missing_pod and context.before.reason == "Running":
        # The training operator would replace the pod within the attempt; the others might wait forever.
        message = f"pod {observation.child.missing_pod} was deleted while it ran"
        context.update(message=message)
        context.summarize(
            "Ending", f"{context.name}: {message}; stopping its other pods, then the next attempt resumes"
        )
        _delete_child(context, observation.child)
    else:
        _summarize_child(context, observation.child)


def stop(context: StepContext) -> None:
    """A step that is Running and must stop: delete its child, which saves a checkpoint.

    Suspended once the child is gone.
    """
    child = context.observation.child
    if backend_unavailable(context):
        report_missing_backend(context, "Running")
    elif child is None:
        suspend(context)
    elif child.state == "Succeeded":
        _wait_for_result(context)
    else:
        message = f"{context.name}: stopping at a checkpoint" + (
            f" ({child.message})" if child.message else ""
        )
        context.update(message=message)
        context.summarize("Stopping", message)
        _delete_child(context, child)


def release(context: StepContext) -> None:
    """A step whose trainer has succeeded: stop it and count it as succeeded.

    Its remaining work is not needed.
    """
    child = context.observation.child
    if context.step.state == "Running" and child is not None and child.alive:
        context.update(message="stopping, because training has succeeded")
        context.summarize("Ending", f"{context.name}: {context.step.message}")
        _delete_child(context, child)
    else:
        context.update(
            state="Succeeded",
            finished=context.builder.now,
            failures=0,
            interruptions=0,
            retry_at=None,
            message="training has succeeded",
            reason="Succeeded",
        )


def suspend(context: StepContext) -> None:
    """Suspend a step that has no child alive.

    Resuming is another attempt, which does not count as a failure.
    """
    step = context.update(state="Suspended", retry_at=None)
    where = f" at {step.checkpoint.tokens} tokens" if step.checkpoint else ""
    context.summarize(
        "Suspended", f"{step.name} is suspended{where}. Set spec.suspend to false to resume.", "Suspended"
    )


def report_missing_backend(context: StepContext, phase: RunPhase) -> None:
    """Stalled: the cluster does not serve what runtime.backend names.

    The operator never switches to another backend.
    """
    message = (
        "runtime.backend is PyTorchJob, but this cluster does not serve pytorchjobs.kubeflow.org. "
        "Install the Kubeflow training operator, or apply a new run with backend Job."
    )
    context.summarize("KubeflowMissing", message, phase)
    context.set_stalled("KubeflowMissing", message)


def backoff(pauses: int, settings: Settings) -> timedelta:
    """Pause before the next attempt after this number of pauses: base, twice that, four times that, …, at
    most the limit.
    """
    return timedelta(
        seconds=min(settings.backoff.base_seconds * 2.0 ** min(pauses, 30), settings.backoff.limit_seconds)
    )


def backend_unavailable(context: StepContext) -> bool:
    """Whether the step's child is of a kind that the cluster does not serve now, so that its state is
    unknown.
    """
    child = context.step.child
    return context.builder.children.backend_missing and child is not None and child.kind == PYTORCHJOB.name


def _create_child(context: StepContext, create_error: str) -> None:
    """Create the child that the status names. The action is repeated until the child exists."""
    step = context.step
    context.add(CreateChild(step.name, step.attempt))
    if create_error:
        message = f"{step.name}: the API server rejected the child: {create_error}. Retrying."
        context.summarize("ChildRefused", message)
        context.set_stalled("ChildRefused", message)
    else:
        context.summarize("Starting", step.message)


def _wait_for_result(context: StepContext) -> None:
    """The child has succeeded, but the bucket does not answer."""
    message = f"{context.name} has finished; waiting for the bucket to answer, to read the result"
    context.summarize("StorageUnreachable", message)
    _check_stalled(context, "NoProgress", message)


def _report_name_conflict(context: StepContext, conflict: NameConflict) -> None:
    """Another object has the name of this attempt's child, or of the run's ConfigMap."""
    message = f"{context.name}: {conflict.message}, and this run needs the name"
    if conflict.temporary:
        context.summarize("NameTaken", f"{message}. Waiting for its deletion.")
    else:
        message = f"{message}. Delete it, or give the run another name."
        context.summarize("NameTaken", message)
        context.set_stalled("NameTaken", message)


def _delete_child(context: StepContext, child: ObservedChild) -> None:
    ref = ChildRef(kind=child.kind, name=child.name, uid=child.uid)
    context.update(child=ref)
    if not child.deleting:
        context.add(DeleteChild(ref))


def _summarize_child(context: StepContext, child: ObservedChild) -> None:
    """A child that is alive and may continue."""
    reason = {"Waiting": "Held" if child.suspended else "PodPending", "Ending": "Ending"}.get(
        child.state, "Running"
    )
    progress, step = context.reading.progress, context.step
    activity = child.message or (progress.message if progress else "") or f"attempt {step.attempt} is running"
    moved = {"progressed": context.builder.now} if context.before.reason != reason else {}
    ref = ChildRef(kind=child.kind, name=child.name, uid=child.uid)
    context.update(child=ref, message=activity, **moved)
    queued = (
        child.suspended and context.run.spec.runtime.queue_name
    )  # not admitted by Kueue: it holds nothing
    context.summarize(reason, f"{step.name}: {activity}", "Queued" if queued else "Running")
    # A running sampler or teacher may be waiting for the trainer: only the trainer's time counts.
    waits_for_trainer = context.serves_trainer and child.state == "Running"
    if not child.suspended and not waits_for_trainer:
        _check_stalled(context, "NoProgress" if child.state == "Running" else "PodPending", activity)


def _check_stalled(context: StepContext, reason: str, message: str) -> None:
    """Mark the step stalled if it has made no progress for runtime.stalledAfter, or requeue for that time.

    If the bucket does not answer, progress is unknown: that is then the reason.
    """
    builder, step = context.builder, context.step
    if step.progressed is None:
        return
    deadline = step.progressed + timedelta(seconds=context.run.spec.runtime.stalled_after)
    if builder.now < deadline:
        builder.requeue_at(deadline)
        return
    if context.reading.problem and reason == "NoProgress":
        reason, message = "StorageUnreachable", context.reading.problem
    context.set_stalled(
        reason, f"{step.name} has made no progress since {step.progressed:%Y-%m-%d %H:%M:%S} UTC: {message}"
    )


def _merge_progress(context: StepContext) -> None:
    """Copy the step's progress report into the status. A new checkpoint resets its failures.

    Steps without checkpoints: a new part or window.
    """
    progress, step, builder = context.reading.progress, context.step, context.builder
    if progress is None:
        return
    tokens, parts, changes = progress.tokens, progress.parts, dict[str, Any]()
    if tokens is not None:
        changes |= {"tokens_done": tokens.done, "tokens_total": tokens.total}
    if parts is not None:
        changes |= {"parts_done": parts.done, "parts_total": parts.total}
    if progress.checkpoint is not None:
        changes["checkpoint"] = progress.checkpoint
    if progress.held_out is not None:
        changes["held_out"] = progress.held_out
    if progress.validity is not None:
        changes["validity"] = progress.validity
    if any(dict(step)[name] != value for name, value in changes.items()):
        changes["progressed"] = builder.now
    after = context.update(**changes)
    if _saved_work(after) > _saved_work(step):
        context.update(failures=0, interruptions=0)
    builder.update(
        loss=progress.loss if progress.loss is not None else builder.status.loss,
        checkpoint=after.checkpoint or builder.status.checkpoint,
        held_out=after.held_out or builder.status.held_out,
        validity=after.validity if progress.validity is not None else builder.status.validity,
    )
    if progress.dataset is not None and builder.status.provenance is not None:
        builder.update(
            provenance=RunProvenance.model_validate(
                {**dict(builder.status.provenance), "dataset": progress.dataset}
            )
        )


def _saved_work(step: StepStatus) -> int:
    """The progress with which another attempt would start: optimizer steps of a step that trains, parts or
    windows of any other.
    """
    return step.checkpoint.iteration if step.checkpoint else step.parts_done or 0


def _succeed(context: StepContext) -> None:
    """The child has succeeded.

    So has the step once its last progress is read: later children carry the dataset's id.
    """
    if context.reading.problem:
        return
    progress = context.reading.progress
    message = (progress.message if progress else "") or "finished"
    context.update(
        state="Succeeded",
        finished=context.builder.now,
        message=message,
        reason="Succeeded",
        reused=message == REUSED,
        failures=0,
        interruptions=0,
    )


def _fail(context: StepContext, failure: Failure) -> None:
    """An attempt has ended without success.

    Interruptions from outside do not count; runtime.attempts bounds the others.
    """
    step, attempts = context.step, context.run.spec.runtime.attempts
    if failure.kind == "Interrupted" or (failure.kind == "Retriable" and bool(context.reading.problem)):
        message = f"step {step.name} was interrupted (attempt {step.attempt}): {failure.message}"
        _retry(context, message, interruptions=1)
        return
    failures = max(step.failures + 1, attempts if failure.kind == "Permanent" else 0)
    if failure.kind == "Permanent":
        counted, verdict = f"attempt {step.attempt}", "Another attempt would fail in the same way"
    else:
        counted, verdict = f"attempt {step.attempt}, failure {failures} of {attempts}", "No attempts are left"
        if step.attempt == failures:
            counted = f"attempt {failures} of {attempts}"
    message = f"step {step.name} failed ({counted}): {failure.message}"
    if failures < attempts:
        _retry(context, message, failures=1)
        return
    context.update(
        state="Failed",
        failures=failures,
        finished=context.builder.now,
        message=f"{message}. {verdict}. Fix the cause, then raise runtime.attempts to continue.",
        reason="PermanentFailure" if failure.kind == "Permanent" else "AttemptsExhausted",
    )


def _retry(context: StepContext, message: str, failures: int = 0, interruptions: int = 0) -> None:
    """Count the failure or interruption, and set the time of the next attempt.

    A first interruption is retried at once.
    """
    step, now = context.step, context.builder.now
    failures, interruptions = step.failures + failures, step.interruptions + interruptions
    pause = (
        backoff(failures + interruptions - 1, context.builder.settings)
        if failures + interruptions > 1 or failures
        else timedelta()
    )
    context.update(
        state="Retrying",
        failures=failures,
        interruptions=interruptions,
        retry_at=now + pause,
        message=f"{message}. Retrying in {pause.total_seconds():.0f} s.",
    )
