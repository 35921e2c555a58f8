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
from distill_operator.step_images import merge_images
from distill_operator.step_timers import HELD, retry_pause
from vpmoe.api.quantities import as_timedelta, format_duration
from vpmoe.api.status import (
    INTERRUPTIONS_EXHAUSTED,
    AttemptOutcome,
    RunPhase,
    RunProvenance,
    StepStatus,
)

WITHOUT_REPORT = (
    "The run's other results do not need it. To go on without reports, set spec.suspend to true, wait for "
    "phase Suspended, and set spec.runtime.report and spec.suspend to false."
)
"""What helps against a report that does not start. It keeps the run from succeeding, as any pod does that
cannot be scheduled: the cluster may get room for it at any time."""

REPEATED = 2
"""Number of attempts in a row without a new checkpoint, part or window after which only such a one counts as
progress: the next attempt may do again what these did, and end like them."""


def record_outcome(context: StepContext) -> None:
    """Merge the progress of a Running step, and record its outcome if it has ended.

    Otherwise it stays Running.
    """
    _note_readability(context)
    _note_images(context)
    _merge_progress(context)
    step, child, progress = context.step, context.observation.child, context.report
    if backend_unavailable(context) or context.may_appear:
        return
    if step.outcome is not None:
        if child is None:  # its pods are gone
            _finish(context, step.outcome)
    elif context.observation.name_conflict is not None:
        return
    elif child is None:
        if progress is not None and progress.state == "Succeeded":
            _succeed(context)
        elif context.run.spec.suspend or step.reason == "Stopping":
            context.update(state="Suspended")  # the operator deleted the child
        elif step.child is None or step.child.uid is not None:  # without a uid it was never created
            name = f"{step.child.kind} {step.child.name}" if step.child else "its child"
            _fail(context, Failure("Interrupted", f"{name} was deleted"))
    elif child.lingering:
        _record_lingering(context, child)
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
    elif context.step.outcome is not None and observation.child is not None:
        _remove_pods(context, observation.child, context.step.outcome)
    elif observation.name_conflict is not None:
        _report_name_conflict(context, observation.name_conflict)
    elif context.may_appear and context.step.child is not None and context.step.child.uid is not None:
        _await_absence(context, "Ending")
    elif observation.child is None:
        _create_child(context, observation.create_error)
    elif _was_deleted(context, observation.child):
        # The training operator would replace the pod within the attempt; the others might wait forever.
        message = f"pod {observation.child.missing_pod} was deleted while it ran"
        context.update(message=message)
        context.summarize(
            "Ending", f"{context.name}: {message}; stopping its other pods, then the next attempt resumes"
        )
        check_stalled(context, "PodPending", message)
        _delete_child(context, observation.child)
    elif _must_restart(context):
        limit = format_duration(context.run.spec.runtime.stalled_after)
        message = f"no progress for {limit} (runtime.stalledAfter) while its pods ran"
        outcome = AttemptOutcome(result="Error", message=message)
        context.update(outcome=outcome)
        _remove_pods(context, observation.child, outcome)
    else:
        _summarize_child(context, observation.child)


def stop(context: StepContext) -> None:
    """A step that is Running and must stop: delete its child, which saves a checkpoint.

    Suspended once the child is gone.
    """
    child = context.observation.child
    if backend_unavailable(context):
        report_missing_backend(context, "Running")
    elif context.may_appear:
        _await_absence(context, "Stopping")
    elif child is None:
        suspend(context)
    elif context.step.outcome is not None:
        _remove_pods(context, child, context.step.outcome)
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
    elif context.step.state == "Running" and context.may_appear:
        _await_absence(context, "Ending")
    else:
        context.update(
            state="Succeeded",
            finished=context.builder.now,
            failures=0,
            interruptions=0,
            retry_at=None,
            outcome=None,
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
        "Install the Kubeflow training operator, or set runtime.backend to Job."
    )
    context.summarize("KubeflowMissing", message, phase)
    context.set_stalled("KubeflowMissing", message)


def pause_left(context: StepContext) -> timedelta:
    """Time until a Retrying step starts its next attempt, at most its pause, whatever the wall clock says."""
    step, timer = context.step, context.timer
    if timer is not None and context.before.state == "Retrying":
        return timer.pause_left
    left = (step.retry_at or context.builder.now) - context.builder.now
    return min(left, retry_pause(step, context.builder.settings))


def wait_for_retry(context: StepContext, left: timedelta) -> None:
    """A Retrying step that starts its next attempt after the time `left`."""
    context.builder.requeue_at(context.builder.now + max(left, timedelta()))
    context.summarize("Retrying", context.step.message)
    check_stalled(context, "NoProgress", context.step.message)


def backend_unavailable(context: StepContext) -> bool:
    """Whether the step's child is of a kind that the cluster does not serve now, so that its state is
    unknown.
    """
    child = context.step.child
    return context.builder.children.backend_missing and child is not None and child.kind == PYTORCHJOB.name


def _was_deleted(context: StepContext, child: ObservedChild) -> bool:
    """Whether a pod of the child was deleted while it ran: it is missing, and all pods ran before.

    If Kueue suspended and resumed the child since then, for instance while no operator ran, its pods are made
    again within the attempt.
    """
    resumed = child.resumed is not None and child.resumed != context.before.resumed
    return bool(child.missing_pod) and context.before.reason == "Running" and not resumed


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
        check_stalled(context, "NoProgress", step.message)


def _await_absence(context: StepContext, reason: str) -> None:
    """The child of an attempt that is over does not exist, and may appear yet: the step neither ends nor
    starts again before it is certain that it does not. Its pods would run beside those of the next attempt.
    """
    child = context.step.child
    name = f"{child.kind} {child.name}" if child is not None else "its child"
    message = f"waiting until {name} cannot appear any more: a request to create it had no answer"
    context.update(message=message)
    context.summarize(reason, f"{context.name}: {message}")
    context.builder.polls = True


def _report_name_conflict(context: StepContext, conflict: NameConflict) -> None:
    """Another object has the name of this attempt's child, or of the run's ConfigMap."""
    message = f"{context.name}: {conflict.message}, and this run needs the name"
    if conflict.temporary:
        context.summarize("NameTaken", f"{message}. Waiting for its deletion.")
    else:
        message = f"{message}. Delete it, or give the run another name."
        context.summarize("NameTaken", message)
        context.set_stalled("NameTaken", message)


def _remove_pods(context: StepContext, child: ObservedChild, outcome: AttemptOutcome) -> None:
    """A step whose attempt has ended and has pods alive: delete its child."""
    message = f"{outcome.message}; removing its pods" + (f" ({child.message})" if child.deleting else "")
    context.update(message=message)
    context.summarize("Ending", f"{context.name}: {message}")
    check_stalled(context, "NoProgress", message)
    _delete_child(context, child)


def _must_restart(context: StepContext) -> bool:
    """Whether onStall is Restart and the step hangs: all of its pods run, its progress can be read, and there
    was none for runtime.stalledAfter.

    The sampler and the teacher of an OnPolicy stage may only be waiting for its trainer, and the trainer for
    them; the step that measures validity waits for checkpoints. Which of them hangs is not known, so those
    that make no progress are restarted with the trainer.
    """
    if context.run.spec.runtime.on_stall == "Report":
        return False
    if context.timer is not None:
        left = as_timedelta(context.run.spec.runtime.stalled_after) - context.timer.unchanged
        context.requeue_after(left)
    return _hangs(context) and (not context.serves_trainer or _hangs(context.trainer))


def _hangs(context: StepContext) -> bool:
    limit = as_timedelta(context.run.spec.runtime.stalled_after)
    if context.step.state != "Running" or context.timer is None or context.timer.unchanged < limit:
        return False
    child = context.observation.child
    return child is not None and child.state == "Running"


def _delete_child(context: StepContext, child: ObservedChild) -> None:
    context.update(child=child.ref)
    if not child.deleting:
        context.add(DeleteChild(child.ref))


def _summarize_child(context: StepContext, child: ObservedChild) -> None:
    """A child that is alive and may continue."""
    reason = {"Waiting": HELD if child.suspended else "PodPending", "Ending": "Ending"}.get(
        child.state, "Running"
    )
    report, step = context.report, context.step
    activity = child.message or (report.message if report else "") or f"attempt {step.attempt} is running"
    resumed = child.resumed if reason == "Running" else step.resumed
    context.update(child=child.ref, message=activity, resumed=resumed)
    if context.before.reason != reason:
        _note_start(context)
    queued = (
        child.suspended and context.run.spec.runtime.queue_name
    )  # not admitted by Kueue: it holds nothing
    context.summarize(reason, f"{step.name}: {activity}", "Queued" if queued else "Running")
    # A running step that serves a trainer may be waiting for it: only the trainer's time counts.
    waits_for_trainer = (
        context.serves_trainer and child.state == "Running" and _attempts_in_a_row(step) < REPEATED
    )
    if not child.suspended and not waits_for_trainer:
        check_stalled(context, "NoProgress" if child.state == "Running" else "PodPending", activity)


def _note_start(context: StepContext) -> None:
    """The pods of a step have started, or got further on the way to it. That is progress, but not of an
    attempt that follows a failed one. Time in a queue does not count for runtime.stalledAfter in any case.
    """
    step, now, timer = context.step, context.builder.now, context.timer
    if _attempts_in_a_row(step) == 0 or step.progressed is None:
        context.update(progressed=now)
    elif context.before.reason == HELD:
        held = timer.held if timer is not None else timedelta()
        context.update(progressed=min(now, step.progressed + held))


def check_stalled(context: StepContext, reason: str, message: str) -> None:
    """Mark the step stalled if it has made no progress for runtime.stalledAfter; otherwise requeue for the
    time at which it would be.

    While its progress cannot be read, it is not known whether it makes any.
    """
    step, limit = context.step, as_timedelta(context.run.spec.runtime.stalled_after)
    if step.progressed is None:
        return
    if context.idle < limit:
        context.requeue_after(limit - context.idle)
        return
    if reason == "NoProgress" and _progress_is_unknown(context):
        return
    text = f"{step.name} has made no progress since {step.progressed:%Y-%m-%d %H:%M:%S} UTC: {message}"
    if context.run.role(step.name) == "report":
        text = f"{text.rstrip('.')}. {WITHOUT_REPORT}"
    context.set_stalled(reason, text)


def _progress_is_unknown(context: StepContext) -> bool:
    """Whether the step's pods run and their progress cannot be read, or has not been read yet.

    After a failed attempt it is known that there was none before.
    """
    child, reading = context.observation.child, context.reading
    if child is None or child.state != "Running":
        return False
    return bool(reading.problem) or (not reading.attempted and _attempts_in_a_row(context.step) == 0)


def _note_readability(context: StepContext) -> None:
    """Record since when progress cannot be read. That time does not count for runtime.stalledAfter."""
    step, child, now = context.step, context.observation.child, context.builder.now
    if context.reading.problem:
        context.update(unreadable_since=step.unreadable_since or now)
    elif step.unreadable_since is not None and (
        context.progress_is_known or child is None or not child.alive
    ):
        progressed = step.progressed and min(now, step.progressed + (now - step.unreadable_since))
        context.update(unreadable_since=None, progressed=progressed)


def _note_images(context: StepContext) -> None:
    """Record what the attempt's pods run: the images that the cluster reports, and the commits that the pods
    report.
    """
    child, step = context.observation.child, context.step
    reports = context.reading.images | (child.images if child is not None else frozenset())
    if reports:
        context.update(images=merge_images(step.images or (), step.attempt, reports))


def _merge_progress(context: StepContext) -> None:
    """Copy the attempt's progress into the status. A new checkpoint resets the step's failures.

    Steps without checkpoints: a new part or window. Their number never falls: an attempt that has not looked
    for all of them yet, or a pod that knows of fewer, has not lost any. What an attempt finds when it starts
    was saved by those before it, so their progress counts even if nothing was known of it.

    Anything else that changes is progress too, except after REPEATED attempts without a checkpoint.
    """
    progress, step, builder = context.report, context.step, context.builder
    if progress is None:
        return
    tokens, parts, changes = progress.tokens, progress.parts, dict[str, Any]()
    if tokens is not None:
        changes |= {"tokens_done": tokens.done, "tokens_total": tokens.total}
    if parts is not None:
        changes |= {"parts_done": max(parts.done, step.parts_done or 0), "parts_total": parts.total}
    if progress.checkpoint is not None:
        changes["checkpoint"] = progress.checkpoint
    if progress.held_out is not None:
        changes["held_out"] = progress.held_out
    if progress.validity is not None:
        changes["validity"] = progress.validity
    if progress.model is not None:
        changes["model"] = progress.model
    moved = any(dict(step)[name] != value for name, value in changes.items())
    after = context.update(**changes)
    saved, furthest = _saved_work(after), max(_saved_work(step), step.furthest or 0)
    # An attempt that falls back to an older checkpoint has saved nothing new before it is further than that.
    after = context.update(furthest=furthest if saved < furthest else None)
    if saved > furthest:
        context.update(failures=0, interruptions=0, progressed=builder.now)
    elif moved and _attempts_in_a_row(step) < REPEATED:
        context.update(progressed=builder.now)
    builder.update(
        loss=progress.loss if progress.loss is not None else builder.status.loss,
        checkpoint=after.checkpoint or builder.status.checkpoint,
        held_out=after.held_out or builder.status.held_out,
        validity=after.validity if progress.validity is not None else builder.status.validity,
        model=next((one.model for one in reversed(builder.status.steps) if one.model), builder.status.model),
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


def _attempts_in_a_row(step: StepStatus) -> int:
    """Number of attempts that ended one after the other without a new checkpoint, part or window."""
    return step.failures + step.interruptions


def _record_lingering(context: StepContext, child: ObservedChild) -> None:
    """Record how the attempt ended although other containers keep its pods alive.

    The pods hold GPUs, so the step stays Running until they have been removed. What is recorded is the
    outcome then: the pods cannot be asked again.
    """
    failure, report = child.failure, context.report
    if failure is not None:
        context.update(outcome=AttemptOutcome(result=failure.kind, message=failure.message))
    else:
        outcome = AttemptOutcome(result="Succeeded", message=_success_message(context))
        context.update(outcome=outcome, reused=report is not None and bool(report.reused))


def _finish(context: StepContext, outcome: AttemptOutcome) -> None:
    """The pods of an attempt that had ended are gone."""
    context.update(outcome=None)
    if outcome.result == "Succeeded":
        _record_success(context, outcome.message)
    else:
        _fail(context, Failure(outcome.result, outcome.message))


def _succeed(context: StepContext) -> None:
    """The child has succeeded, and so has the step: with what its pods recorded, or the last known progress
    if they are gone.
    """
    report, child = context.report, context.observation.child
    if child is not None:  # it may be alive: its uid says that it is no orphan
        context.update(child=child.ref)
    context.update(reused=report is not None and bool(report.reused))
    _record_success(context, _success_message(context))


def _success_message(context: StepContext) -> str:
    """What the job said last."""
    child, report = context.observation.child, context.report
    recorded = child.record.message if child is not None and child.record is not None else ""
    return recorded or (report.message if report is not None else "") or "finished"


def _record_success(context: StepContext, message: str) -> None:
    context.update(
        state="Succeeded",
        finished=context.builder.now,
        message=message,
        reason="Succeeded",
        failures=0,
        interruptions=0,
    )


def _fail(context: StepContext, failure: Failure) -> None:
    """An attempt has ended without success.

    runtime.interruptions bounds interruptions from outside, runtime.attempts everything else.
    """
    step, attempts = context.step, context.run.spec.runtime.attempts
    if failure.kind == "Interrupted":
        _interrupt(context, failure)
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
    if context.run.role(step.name) == "report":
        _skip(context, message)
        return
    context.update(
        state="Failed",
        failures=failures,
        finished=context.builder.now,
        message=f"{message}. {verdict}. Fix the cause, then raise runtime.attempts to continue.",
        reason="PermanentFailure" if failure.kind == "Permanent" else "AttemptsExhausted",
    )


def _interrupt(context: StepContext, failure: Failure) -> None:
    """An attempt was stopped from outside. Without any progress in between, the last of
    runtime.interruptions fails the step.
    """
    step, limit = context.step, context.run.spec.runtime.interruptions
    interruptions = step.interruptions + 1
    counted = f"attempt {step.attempt}"
    if interruptions > 1:
        counted += f", interruption {interruptions} of {limit} in a row"
    message = f"step {step.name} was interrupted ({counted}): {failure.message}"
    if interruptions < limit:
        _retry(context, message, interruptions=1)
        return
    if context.run.role(step.name) == "report":
        _skip(context, message)
        return
    context.update(
        state="Failed",
        interruptions=interruptions,
        finished=context.builder.now,
        message=f"{message}. No attempt made progress. "
        "Remove the cause, then raise runtime.interruptions to continue.",
        reason=INTERRUPTIONS_EXHAUSTED,
    )


def _skip(context: StepContext, message: str) -> None:
    """A report that cannot be made: the run goes on, and its result does not depend on it."""
    _record_success(context, f"{message}. The run goes on without it: vpmoe report makes it at any time.")


def _retry(context: StepContext, message: str, failures: int = 0, interruptions: int = 0) -> None:
    """Count the failure or interruption, and set the time of the next attempt.

    A first interruption is retried at once.
    """
    step = context.step
    waited_for_trainer = context.serves_trainer and _attempts_in_a_row(step) == 0
    step = context.update(
        state="Retrying",
        failures=step.failures + failures,
        interruptions=step.interruptions + interruptions,
        progressed=context.builder.now if waited_for_trainer else step.progressed,
    )
    pause = retry_pause(step, context.builder.settings)
    context.update(
        retry_at=context.builder.now + pause,
        message=f"{message}. Retrying in {pause.total_seconds():.0f} s.",
    )
