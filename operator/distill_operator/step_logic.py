"""A step at work: what its child and its progress say, and what follows. Part of plan.py's decision, with the same purity.

Everything here is about one step: what several steps make of the run together is headline.py's business.
"""

from datetime import timedelta
from typing import Any

from distill_operator.actions import Create, Delete
from distill_operator.kube import PYTORCHJOB
from distill_operator.observe import Child, NameConflict
from distill_operator.plan_builder import StepContext
from distill_operator.pod_diagnosis import Failure
from distill_operator.settings import Settings
from vpmoe.api.status import ChildRef as ChildName
from vpmoe.api.status import RunPhase, RunProvenance, StepStatus

REUSED = "Reused"
"""What a step says that found everything in the bucket already."""


def settle(work: StepContext) -> None:
    """A step whose child should be alive: take over what it says, and see whether it has ended. Otherwise it stays Running."""
    _fold(work)
    step, child, progress = work.step, work.sight.child, work.reading.progress
    if blind(work) or work.sight.stranger is not None:
        return
    if child is None:
        if progress is not None and progress.state == "Succeeded" and progress.attempt == step.attempt:
            _succeed(work)
        elif work.run.spec.suspend or step.reason == "Stopping":
            work.set(state="Suspended")  # it was asked to stop, and has
        elif step.child is None or step.child.uid is not None:
            gone = (
                f"{step.child.kind} {step.child.name} was deleted" if step.child else "its child was deleted"
            )
            _fail(work, Failure("Interrupted", gone))
    elif child.state == "Succeeded":
        _succeed(work)
    elif child.state == "Failed" and child.failure is not None:
        _fail(work, child.failure)


def accompany(work: StepContext) -> None:
    """A step that is Running and has not ended: make its child, or say how it gets on."""
    sight = work.sight
    if blind(work):
        miss_backend(work, "Running")
    elif sight.stranger is not None:
        _give_way(work, sight.stranger)
    elif sight.child is None:
        _make(work, sight.refused)
    elif sight.child.state == "Succeeded":
        _await_word(work)
    elif sight.child.lost and work.before.reason == "Running":
        # The training operator puts a new pod in its place, and would count this as the same attempt; the others may wait for ever.
        words = f"pod {sight.child.lost} was removed while it ran"
        work.set(message=words)
        work.say("Ending", f"{work.name}: {words}; the others stop, and the next attempt goes on")
        _delete(work, sight.child)
    else:
        _watch(work, sight.child)


def halt(work: StepContext) -> None:
    """A step that is Running and must not go on: its child stops at a checkpoint, and the step is Suspended when it is gone."""
    child = work.sight.child
    if blind(work):
        miss_backend(work, "Running")
    elif child is None:
        suspend(work)
    elif child.state == "Succeeded":
        _await_word(work)
    else:
        message = f"{work.name}: stopping at a checkpoint" + (f" ({child.why})" if child.why else "")
        work.set(message=message)
        work.say("Stopping", message)
        _delete(work, child)


def dismiss(work: StepContext) -> None:
    """The training that the step works beside has succeeded: nothing is lost with what it has not done, or could not do."""
    child = work.sight.child
    if work.step.state == "Running" and child is not None and child.alive:
        work.set(message="training has succeeded: it ends")
        work.say("Ending", f"{work.name}: {work.step.message}")
        _delete(work, child)
    else:
        words = {"message": "training has succeeded", "reason": "Succeeded"}
        work.set(
            state="Succeeded", finished=work.draft.now, failures=0, interruptions=0, retry_at=None, **words
        )


def suspend(work: StepContext) -> None:
    """Nothing of the step is alive, and nothing is made: going on is another attempt, which does not count."""
    step = work.set(state="Suspended", retry_at=None)
    done = f" at {step.checkpoint.tokens} tokens" if step.checkpoint else ""
    work.say("Suspended", f"{step.name} is suspended{done}; set spec.suspend to false to go on", "Suspended")


def miss_backend(work: StepContext, phase: RunPhase) -> None:
    """runtime.backend alone chooses what training is made as: what is not installed is not worked around."""
    message = (
        "runtime.backend is PyTorchJob, and this cluster has no pytorchjobs.kubeflow.org: install the Kubeflow training operator, "
        "or make the run anew with backend Job"
    )
    work.say("KubeflowMissing", message, phase)
    work.stall("KubeflowMissing", message)


def backoff(pauses: int, settings: Settings) -> timedelta:
    """Pause before the next attempt after so many pauses: base, twice that, four times that, …, at most the limit."""
    return timedelta(
        seconds=min(settings.backoff.base_seconds * 2.0 ** min(pauses, 30), settings.backoff.limit_seconds)
    )


def blind(work: StepContext) -> bool:
    """Whether the step's child is of a kind that the cluster does not serve at the moment: nobody knows what has become of it."""
    child = work.step.child
    return work.draft.seen.backend_missing and child is not None and child.kind == PYTORCHJOB.name


def _make(work: StepContext, refused: str) -> None:
    """Status names the child, and it is not there: make it, again if need be."""
    step = work.step
    work.ask(Create(step.name, step.attempt))
    if refused:
        message = f"{step.name}: the API server refuses its child: {refused}. It is asked again."
        work.say("ChildRefused", message)
        work.stall("ChildRefused", message)
    else:
        work.say("Starting", step.message)


def _await_word(work: StepContext) -> None:
    """The child has succeeded, and the bucket does not answer."""
    words = "has finished; its result is read as soon as the bucket answers"
    work.say("StorageUnreachable", f"{work.name} {words}")
    _mind_time(work, "NoProgress", words)


def _give_way(work: StepContext, stranger: NameConflict) -> None:
    """Another object has the name that this attempt's child must have."""
    words = f"{work.name}: {stranger.words}, and this run needs its name"
    if stranger.ending:
        work.say("NameTaken", f"{words}: waiting for it to go.")
    else:
        message = f"{words}. Delete it, or give the run another name."
        work.say("NameTaken", message)
        work.stall("NameTaken", message)


def _delete(work: StepContext, child: Child) -> None:
    named = ChildName(kind=child.kind, name=child.name, uid=child.uid)
    work.set(child=named)
    if not child.deleting:
        work.ask(Delete(named))


def _watch(work: StepContext, child: Child) -> None:
    """A child that is alive and may go on."""
    reason = {"Waiting": "Held" if child.held else "PodPending", "Ending": "Ending"}.get(
        child.state, "Running"
    )
    progress, step = work.reading.progress, work.step
    doing = child.why or (progress.message if progress else "") or f"attempt {step.attempt} is running"
    moved = {"progressed": work.draft.now} if work.before.reason != reason else {}
    work.set(child=ChildName(kind=child.kind, name=child.name, uid=child.uid), message=doing, **moved)
    queued = child.held and work.run.spec.runtime.queue_name  # Kueue has not admitted it: it holds nothing
    work.say(reason, f"{step.name}: {doing}", "Queued" if queued else "Running")
    waits = (
        work.beside and child.state == "Running"
    )  # sampler, teacher and trainer wait for each other: the trainer's time is all three's
    if not child.held and not waits:
        _mind_time(work, "NoProgress" if child.state == "Running" else "PodPending", doing)


def _mind_time(work: StepContext, reason: str, words: str) -> None:
    """Stalled once the step has not got on for runtime.stalledAfter. Where the bucket does not answer, nobody knows whether it has."""
    draft, step = work.draft, work.step
    if step.progressed is None:
        return
    deadline = step.progressed + timedelta(seconds=work.run.spec.runtime.stalled_after)
    if draft.now < deadline:
        draft.wakes.append(deadline)
        return
    if work.reading.problem and reason == "NoProgress":
        reason, words = "StorageUnreachable", work.reading.problem
    work.stall(reason, f"{step.name} has not got on since {step.progressed:%Y-%m-%d %H:%M:%S} UTC: {words}")


def _fold(work: StepContext) -> None:
    """Take over what the step says about itself. A new checkpoint (a new part or window, where there are none) clears its failures."""
    progress, step, draft = work.reading.progress, work.step, work.draft
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
        changes["progressed"] = draft.now
    after = work.set(**changes)
    if _saved(after) > _saved(step):
        work.set(failures=0, interruptions=0)
    draft.set(
        loss=progress.loss if progress.loss is not None else draft.status.loss,
        checkpoint=after.checkpoint or draft.status.checkpoint,
        held_out=after.held_out or draft.status.held_out,
        validity=after.validity if progress.validity is not None else draft.status.validity,
    )
    if progress.dataset is not None and draft.status.provenance is not None:
        draft.set(
            provenance=RunProvenance.model_validate(
                {**dict(draft.status.provenance), "dataset": progress.dataset}
            )
        )


def _saved(step: StepStatus) -> int:
    """How far another attempt would start from: optimizer steps of training, parts or windows of everything else."""
    return step.checkpoint.iteration if step.checkpoint else step.parts_done or 0


def _succeed(work: StepContext) -> None:
    """The child has succeeded: so has the step, once its last word has been read (later children carry the data set's id)."""
    if work.reading.problem:
        return
    progress = work.reading.progress
    words = (progress.message if progress else "") or "finished"
    work.set(
        state="Succeeded",
        finished=work.draft.now,
        message=words,
        reason="Succeeded",
        reused=words == REUSED,
        failures=0,
        interruptions=0,
    )


def _fail(work: StepContext, failure: Failure) -> None:
    """An attempt has ended without success. Only what the run itself did wrong counts, and only so often."""
    step, attempts = work.step, work.run.spec.runtime.attempts
    blameless = failure.kind == "Interrupted" or (failure.kind == "Retriable" and bool(work.reading.problem))
    if blameless:
        _retry(
            work,
            f"step {step.name} was interrupted (attempt {step.attempt}): {failure.words}",
            interruptions=1,
        )
        return
    failures = max(step.failures + 1, attempts if failure.kind == "Permanent" else 0)
    if failure.kind == "Permanent":
        counted, last = f"attempt {step.attempt}", "Another attempt would end the same"
    else:
        counted, last = f"attempt {step.attempt}, failure {failures} of {attempts}", "No attempts are left"
        if step.attempt == failures:
            counted = f"attempt {failures} of {attempts}"
    words = f"step {step.name} failed ({counted}): {failure.words}"
    if failures < attempts:
        _retry(work, words, failures=1)
        return
    message = f"{words}. {last}; mend the cause, then raise runtime.attempts to go on."
    reason = "PermanentFailure" if failure.kind == "Permanent" else "AttemptsExhausted"
    work.set(state="Failed", failures=failures, finished=work.draft.now, message=message, reason=reason)


def _retry(work: StepContext, words: str, failures: int = 0, interruptions: int = 0) -> None:
    """Count what happened, and let the next attempt wait. After a first interruption there is nothing to wait for."""
    step, now = work.step, work.draft.now
    failures, interruptions = step.failures + failures, step.interruptions + interruptions
    pause = (
        backoff(failures + interruptions - 1, work.draft.settings)
        if failures + interruptions > 1 or failures
        else timedelta()
    )
    message = f"{words}. Retrying in {pause.total_seconds():.0f} s."
    work.set(
        state="Retrying",
        failures=failures,
        interruptions=interruptions,
        retry_at=now + pause,
        message=message,
    )
