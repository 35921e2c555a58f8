"""A step at work: what its child and its progress say, and what follows. Part of plan.py's decision, with the same purity."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

from distill_operator.actions import Create, Delete
from distill_operator.children import PREPROCESS
from distill_operator.draft import Draft
from distill_operator.observe import Child, Observed, Stranger
from distill_operator.pods import Failure
from distill_operator.progress import Reading
from distill_operator.settings import Settings
from distill_operator.share import share
from vpmoe.api import DistillRun
from vpmoe.api.status import Child as ChildName
from vpmoe.api.status import Phase, Provenance, Step

REUSED = "Reused"
"""What a step says that found everything in the bucket already."""


def watch(draft: Draft, run: DistillRun, step: Step) -> bool:
    """A step whose child should be alive: see what became of it. Whether the step has succeeded, so that the next one may start."""
    child, stranger, progress = draft.seen.child, draft.seen.stranger, draft.reading.progress
    step = _fold(draft, run, step)
    if draft.seen.backend_missing:
        miss_backend(draft, "Running")
    elif stranger is not None:
        _give_way(draft, step, stranger)
    elif child is None and progress is not None and progress.state == "Succeeded" and progress.attempt == step.attempt:
        return _succeed(draft, run, step)
    elif child is None and run.spec.suspend:
        suspend(draft, step)
    elif child is None and step.child is not None and step.child.uid is None:
        _make(draft, step)
    elif child is None:
        gone = f"{step.child.kind} {step.child.name} was deleted" if step.child else "its child was deleted"
        _fail(draft, run, step, Failure("Interrupted", gone))
    elif child.state == "Succeeded":
        return _succeed(draft, run, step)
    elif child.state == "Failed" and child.failure is not None:
        _fail(draft, run, step, child.failure)
    else:
        _accompany(draft, run, step, child)
    return False


def _make(draft: Draft, step: Step) -> None:
    """Status names the child, and it is not there: make it, again if need be."""
    draft.actions.append(Create(step.name, step.attempt))
    if draft.seen.refused:
        draft.say("Running", "ChildRefused", f"{step.name}: the API server refuses its child: {draft.seen.refused}. It is asked again.")
        draft.stall("ChildRefused", draft.status.message)
    else:
        draft.say("Running", "Starting", step.message)


def _give_way(draft: Draft, step: Step, stranger: Stranger) -> None:
    """Another object has the name that this attempt's child must have."""
    words = f"{step.name}: {stranger.words}, and this run needs its name"
    if stranger.ending:
        draft.say("Running", "NameTaken", f"{words}: waiting for it to go.")
    else:
        draft.say("Running", "NameTaken", f"{words}. Delete it, or give the run another name.")
        draft.stall("NameTaken", draft.status.message)


def _accompany(draft: Draft, run: DistillRun, step: Step, child: Child) -> None:
    """A child that is alive."""
    named = ChildName(kind=child.kind, name=child.name, uid=child.uid)
    before = draft.live.status.condition("Progressing")
    if run.spec.suspend:
        if not child.deleting:
            draft.actions.append(Delete(named))
        message = f"{step.name}: stopping at a checkpoint" + (f" ({child.why})" if child.why else "")
        draft.step(step.name, child=named, message=message)
        draft.say("Running", "Stopping", message)
        return
    if child.lost and before is not None and before.reason == "Running":
        # The training operator puts a new pod in its place, and would count this as the same attempt; the others may wait for ever.
        draft.actions.append(Delete(named))
        draft.step(step.name, child=named, message=f"pod {child.lost} was removed while it ran")
        draft.say(
            "Running", "Ending", f"{step.name}: pod {child.lost} was removed while it ran; the others stop, and the next attempt goes on"
        )
        return
    reason = {"Waiting": "Held" if child.held else "PodPending", "Ending": "Ending"}.get(child.state, "Running")
    progress = draft.reading.progress
    doing = child.why or (progress.message if progress else "") or f"attempt {step.attempt} is running"
    moved = {"progressed": draft.now} if before is None or before.reason != reason else {}
    step = draft.step(step.name, child=named, message=doing, **moved)
    queued = child.held and run.spec.runtime.queue_name  # Kueue has not admitted it: it holds nothing
    draft.say("Queued" if queued else "Running", reason, f"{step.name}: {doing}")
    if not child.held:
        _mind_time(draft, run, step, "NoProgress" if child.state == "Running" else "PodPending", doing)


def _mind_time(draft: Draft, run: DistillRun, step: Step, reason: str, words: str) -> None:
    """Stalled once the step has not got on for runtime.stalledAfter. Where the bucket does not answer, nobody knows whether it has."""
    if step.progressed is None:
        return
    deadline = step.progressed + timedelta(seconds=run.spec.runtime.stalled_after)
    if draft.now < deadline:
        draft.wakes.append(deadline)
        return
    if draft.reading.problem and reason == "NoProgress":
        reason, words = "StorageUnreachable", draft.reading.problem
    draft.stall(reason, f"{step.name} has not got on since {step.progressed:%Y-%m-%d %H:%M:%S} UTC: {words}")


def _fold(draft: Draft, run: DistillRun, step: Step) -> Step:
    """Take over what the step says about itself. A new checkpoint (preprocessing: a new part) clears its failures."""
    progress = draft.reading.progress
    if progress is None:
        return step
    tokens, parts, changes = progress.tokens, progress.parts, dict[str, Any]()
    if tokens is not None:
        changes |= {"tokens_done": tokens.done, "tokens_total": tokens.total}
    if parts is not None:
        changes |= {"parts_done": parts.done, "parts_total": parts.total}
    if progress.checkpoint is not None:
        changes["checkpoint"] = progress.checkpoint
    if progress.held_out is not None:
        changes["held_out"] = progress.held_out
    if any(dict(step)[name] != value for name, value in changes.items()):
        changes["progressed"] = draft.now
    after = draft.step(step.name, **changes)
    if _saved(after) > _saved(step):
        after = draft.step(step.name, failures=0, interruptions=0)
    draft.set(
        loss=progress.loss,
        tokens_per_second=progress.tokens_per_second,
        progress=share(run, draft.status),
        checkpoint=after.checkpoint or draft.status.checkpoint,
        held_out=after.held_out or draft.status.held_out,
    )
    if progress.dataset is not None and draft.status.provenance is not None:
        draft.set(provenance=Provenance.model_validate({**dict(draft.status.provenance), "dataset": progress.dataset}))
    draft.said = replace(draft.said, jobs=progress.conditions)
    return after


def _saved(step: Step) -> int:
    """How far another attempt would start from: parts of preprocessing, optimizer steps of training."""
    return (step.checkpoint.iteration if step.checkpoint else 0) if step.name != PREPROCESS else (step.parts_done or 0)


def _succeed(draft: Draft, run: DistillRun, step: Step) -> bool:
    """The child has succeeded: so has the step, once its last word has been read (later children carry the data set's id)."""
    if draft.reading.problem:
        words = "has finished; its result is read as soon as the bucket answers"
        draft.say("Running", "StorageUnreachable", f"{step.name} {words}")
        _mind_time(draft, run, step, "NoProgress", words)
        return False
    progress = draft.reading.progress
    words = (progress.message if progress else "") or "finished"
    draft.step(step.name, state="Succeeded", finished=draft.now, message=words, reused=words == REUSED, failures=0, interruptions=0)
    draft.set(progress=share(run, draft.status), tokens_per_second=None)
    draft.seen = Observed(backend_missing=draft.seen.backend_missing)
    draft.reading = Reading(asked=draft.reading.asked)
    return True


def _fail(draft: Draft, run: DistillRun, step: Step, failure: Failure) -> None:
    """An attempt has ended without success. Only what the run itself did wrong counts, and only so often."""
    attempts = run.spec.runtime.attempts
    blameless = failure.kind == "Interrupted" or (failure.kind == "Retriable" and bool(draft.reading.problem))
    if blameless:
        _retry(draft, run, step, f"step {step.name} was interrupted (attempt {step.attempt}): {failure.words}", interruptions=1)
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
        _retry(draft, run, step, words, failures=1)
        return
    message = f"{words}. {last}; mend the cause, then raise runtime.attempts to go on."
    draft.step(step.name, state="Failed", failures=failures, finished=draft.now, message=message)
    draft.set(finished=draft.now, tokens_per_second=None)
    draft.say("Failed", "PermanentFailure" if failure.kind == "Permanent" else "AttemptsExhausted", message)


def _retry(draft: Draft, run: DistillRun, step: Step, words: str, failures: int = 0, interruptions: int = 0) -> None:
    """Count what happened, and let the next attempt wait. After a first interruption there is nothing to wait for."""
    failures, interruptions = step.failures + failures, step.interruptions + interruptions
    pause = backoff(failures + interruptions - 1, draft.settings) if failures + interruptions > 1 or failures else timedelta()
    message = f"{words}. Retrying in {pause.total_seconds():.0f} s."
    again = draft.now + pause
    step = draft.step(step.name, state="Retrying", failures=failures, interruptions=interruptions, retry_at=again, message=message)
    draft.set(tokens_per_second=None)
    if run.spec.suspend:
        suspend(draft, step)
    else:
        draft.say("Running", "Retrying", message)
        draft.wakes.append(again)


def backoff(pauses: int, settings: Settings) -> timedelta:
    """Pause before the next attempt after so many pauses: base, twice that, four times that, …, at most the limit."""
    return timedelta(seconds=min(settings.backoff.base_seconds * 2.0 ** min(pauses, 30), settings.backoff.limit_seconds))


def suspend(draft: Draft, step: Step) -> None:
    """Nothing of the step is alive: the run holds no GPUs until it is resumed, which is another attempt that does not count."""
    done = f" at {step.checkpoint.tokens} tokens" if step.checkpoint else ""
    draft.step(step.name, state="Suspended", retry_at=None)
    draft.set(tokens_per_second=None)
    draft.say("Suspended", "Suspended", f"{step.name} is suspended{done}; set spec.suspend to false to go on")


def miss_backend(draft: Draft, phase: Phase) -> None:
    """runtime.backend alone chooses what training is made as: what is not installed is not worked around."""
    message = (
        "runtime.backend is PyTorchJob, and this cluster has no pytorchjobs.kubeflow.org: install the Kubeflow training operator, "
        "or make the run anew with backend Job"
    )
    draft.say(phase, "KubeflowMissing", message)
    draft.stall("KubeflowMissing", message)
