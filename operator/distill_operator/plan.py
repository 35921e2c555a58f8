"""What to do next about one DistillRun, from one look at the cluster and the bucket. No I/O and no clock.

reconcile.py looks, writes the status that is decided here, and only then carries out the actions. What becomes of a step is steps.py's
business, what the steps make of the run headline.py's, and conditions are conditions.py's.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta

from distill_operator import conditions
from distill_operator.actions import ClearBucket, Create, Delete, DeleteRun, Finalizer, KeepBucket
from distill_operator.attempt import child_kind, child_name
from distill_operator.gpu_scheduler import Decision
from distill_operator.observe import Observed, ObservedRun
from distill_operator.plan_builder import Plan, PlanBuilder, StepContext, changed
from distill_operator.run_status import conclude, failing
from distill_operator.settings import Settings
from distill_operator.step_logic import accompany, dismiss, halt, miss_backend, settle, suspend
from distill_operator.step_progress import ProgressReading
from vpmoe.api import DistillRun
from vpmoe.api.status import ChildRef as ChildName
from vpmoe.api.status import RunProvenance, Status, StepStatus
from vpmoe.storage import paths

KEPT_ATTEMPTS = 3
"""Children of a step that stay for their logs, the latest included."""


def plan(
    live: ObservedRun,
    seen: Observed,
    readings: Mapping[str, ProgressReading],
    verdict: Decision | None,
    settings: Settings,
    now: datetime,
) -> Plan:
    """Decide. `seen` are the children that Running steps name, `readings` what those steps say, `verdict` the pool's word on a run
    that holds no GPUs (None where it holds them, or will not start anyway).

    Always true, and each line has a test of the same name:
      a step that has finished is never made again, even when its child is gone;
      at most one child a step is alive, and it is the one that status names;
      the GPUs of all living children are at most teacher.gpus + student.gpus;
      no step starts before the steps that it needs have succeeded;
      no child is made before status names it;
      no child is made unless the run is admitted;
      no child is made while another object has its name;
      what worked beside training that has succeeded ends, and counts as succeeded once it has;
      a run that cannot be carried out never starts;
      a run that fails has failed once nothing of it is alive, with its first cause;
      a finished run stays as it is, except that a failed one goes on when attempts is raised;
      the bucket is cleared only when nothing can write to it any more;
      every message fits into the status.
    """
    draft = PlanBuilder(live, seen, readings, verdict, settings, now)
    if live.deleting:
        _end(draft)
    elif live.run is None:
        _refuse(draft, live.invalid)
    else:
        _prepare(draft, live.run)
        _advance(draft, live.run)
    return draft.seal()


def holds_gpus(status: Status) -> bool:
    """Whether a run is admitted: from its first child until it is suspended or finished, pauses between attempts included."""
    return status.phase == "Running"


def _refuse(draft: PlanBuilder, message: str) -> None:
    """A run whose spec cannot be read. Before its first step that is a failure, which mending the spec undoes."""
    status = draft.status
    if status.started is None:
        draft.set(finished=status.finished or draft.now)
        draft.say("Failed", "Invalid", message)
    elif status.phase in ("Succeeded", "Failed"):
        draft.said = conditions.kept(status)
    else:
        draft.say(status.phase, "Invalid", message)
        draft.stall("Invalid", message)


def _prepare(draft: PlanBuilder, run: DistillRun) -> None:
    """What holds for every valid run: its steps, its provenance, our finalizer."""
    status, spec = draft.status, run.spec
    if status.started is None:
        storage = spec.storage
        folder = "/".join(part for part in ("s3:/", storage.bucket, storage.prefix, paths.run(run)) if part)
        draft.set(
            config=run.config_hash[:16],
            provenance=RunProvenance(
                git_sha=draft.settings.git_sha,
                image=draft.settings.images.trainer,
                config_hash=run.config_hash,
                folder=folder,
            ),
            steps=tuple(
                changed(status.step_status(name) or StepStatus(name=name), tokens_total=_planned(run, name))
                for name in run.steps()
            ),
        )
    elif status.phase != "Succeeded":  # the version that started it may have known of fewer steps
        known = [
            status.step_status(name) or StepStatus(name=name, tokens_total=_planned(run, name))
            for name in run.steps()
        ]
        draft.set(steps=tuple(known))
    wanted = spec.deletion_policy == "Delete"
    if draft.live.finalizer != wanted:
        draft.actions.append(Finalizer(wanted))


def _planned(run: DistillRun, step: str) -> int | None:
    return run.stage(step).tokens if run.role(step) == "train" else None


def _advance(draft: PlanBuilder, run: DistillRun) -> None:
    """Carry the run as far as this one look allows: first see what has ended, then say of every step what is to become of it."""
    failed = draft.status.phase == "Failed" and failing(draft.status, run) is not None
    if failed or draft.status.phase == "Succeeded":
        draft.said = conditions.kept(draft.status)
    else:
        works = [StepContext(draft, run, name) for name in run.steps()]
        for work in works:
            if work.step.state == "Running":
                settle(work)
        for work in works:
            if work.dispensable and work.step.state != "Succeeded":
                dismiss(work)
        stopping = run.spec.suspend or failing(draft.status, run) is not None
        for work in works:
            _carry(work, stopping)
        conclude(draft, run, works)
    if draft.status.phase in ("Succeeded", "Failed"):
        _expire(draft, run)


def _carry(work: StepContext, stopping: bool) -> None:
    """One step, after all have been seen. `stopping`: the run is suspended or fails, so that nothing starts and what is alive ends."""
    step, draft = work.step, work.draft
    if (
        step.state == "Succeeded"
        or work.dispensable
        or (step.state == "Failed" and step.failures >= work.run.spec.runtime.attempts)
    ):
        return
    if step.state == "Running":
        (halt if stopping else accompany)(work)
    elif work.lacking:
        work.set(message=f"waits for {' and '.join(work.lacking)}")
    elif stopping:
        suspend(work)
    elif step.state == "Retrying" and step.retry_at and _pauses(work, step.retry_at):
        draft.wakes.append(step.retry_at)
        work.say("Retrying", step.message)
    else:
        _start(work)


def _pauses(work: StepContext, until: datetime) -> bool:
    """Whether a step that Retries waits. What has ended just now is told before it starts anew, even where there is nothing to wait for."""
    return holds_gpus(work.draft.live.status) and (until > work.draft.now or work.before.state != "Retrying")


def _start(work: StepContext) -> None:
    """Make the next attempt, unless something it needs is not there."""
    draft, run, step = work.draft, work.run, work.step
    if draft.seen.backend_missing:
        miss_backend(work, "Running" if holds_gpus(draft.live.status) else "Pending")
        return
    if not holds_gpus(draft.live.status) and not run.spec.runtime.queue_name:
        if draft.verdict is None:
            raise ValueError(
                f"{run.metadata.name} is to start, and nobody has asked whether its GPUs are free"
            )
        if not draft.verdict.admitted:
            work.set(state="Queued")
            work.say("Queued", draft.verdict.arithmetic, "Queued")
            if draft.verdict.hopeless:
                work.stall("PoolTooSmall", draft.verdict.arithmetic)
            return
    attempt = step.attempt + 1
    child = ChildName(kind=child_kind(run, step.name).name, name=child_name(run, step.name, attempt))
    message = f"{step.name}: attempt {attempt} is being made as {child.kind} {child.name}"
    work.set(
        state="Running",
        attempt=attempt,
        child=child,
        message=message,
        started=step.started or draft.now,
        progressed=draft.now,
        retry_at=None,
        finished=None,
    )
    draft.set(started=draft.status.started or draft.now)
    work.say("Starting", message)
    work.ask(Create(step.name, attempt))
    if attempt > KEPT_ATTEMPTS:
        old = child_name(run, step.name, attempt - KEPT_ATTEMPTS)
        work.ask(Delete(ChildName(kind=child.kind, name=old)))


def _expire(draft: PlanBuilder, run: DistillRun) -> None:
    """Delete a finished run when its time has come."""
    ttl, finished = run.spec.ttl_after_finished, draft.status.finished
    if ttl is None or finished is None:
        return
    end = finished + timedelta(seconds=ttl)
    if draft.now >= end:
        draft.actions.append(DeleteRun())
    else:
        draft.wakes.append(end)


def _end(draft: PlanBuilder) -> None:
    """The DistillRun is being deleted. Without our finalizer it goes by itself, and garbage collection takes its children."""
    live, sights = draft.live, draft.seen.children.values()
    alive = [sight.child for sight in sights if sight.child is not None and sight.child.alive]
    draft.said = conditions.kept(draft.status)
    if not live.finalizer:
        return
    if live.run is None:
        draft.actions += [KeepBucket(f"the run's spec cannot be read ({live.invalid})"), Finalizer(False)]
    elif live.run.spec.deletion_policy == "Retain":
        draft.actions.append(Finalizer(False))
    elif alive:
        names = " and ".join(f"{child.kind} {child.name}" for child in alive)
        draft.say(draft.status.phase, "Deleting", f"waiting for {names} to end before the bucket is cleared")
        draft.actions += [
            Delete(ChildName(kind=child.kind, name=child.name, uid=child.uid))
            for child in alive
            if not child.deleting
        ]
    else:
        draft.actions += [ClearBucket(), Finalizer(False)]
