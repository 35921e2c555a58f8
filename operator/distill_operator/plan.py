"""What to do next about one DistillRun, from one look at the cluster and the bucket. No I/O and no clock.

reconcile.py looks, writes the status that is decided here, and only then carries out the actions. Conditions are conditions.py's.
"""

from datetime import datetime, timedelta

from distill_operator import conditions
from distill_operator.actions import ClearBucket, Create, Delete, DeleteRun, Finalizer, KeepBucket
from distill_operator.children import PREPROCESS, child_kind, child_name
from distill_operator.draft import Draft, Plan, changed
from distill_operator.gpus import Verdict
from distill_operator.observe import Live, Observed
from distill_operator.progress import Reading
from distill_operator.settings import Settings
from distill_operator.steps import miss_backend, suspend, watch
from vpmoe.api import DistillRun
from vpmoe.api.status import Child as ChildName
from vpmoe.api.status import Provenance, Status, Step
from vpmoe.storage import paths

EXECUTABLE = ("Vanilla",)
"""Kinds of stages that there are jobs for."""

KEPT_ATTEMPTS = 3
"""Children of a step that stay for their logs, the latest included."""


def plan(live: Live, seen: Observed, reading: Reading, verdict: Verdict | None, settings: Settings, now: datetime) -> Plan:
    """Decide. `seen` is the child that the running step names, `reading` that step's progress, `verdict` the pool's word on a run
    that holds no GPUs (None where it holds them, or will not start anyway).

    Always true, and each line has a test of the same name:
      a step that has finished is never made again, even when its child is gone;
      at most one child is alive, and it is the one that status names;
      no child is made before status names it;
      no child is made unless the run is admitted;
      no child is made while another object has its name;
      a run that cannot be carried out never starts;
      a finished run stays as it is, except that a failed one goes on when attempts is raised;
      the bucket is cleared only when nothing can write to it any more;
      every message fits into the status.
    """
    draft = Draft(live, seen, reading, verdict, settings, now)
    if live.deleting:
        _end(draft)
    elif live.run is None:
        _refuse(draft, "Invalid", live.invalid)
    elif unsupported(live.run):
        _refuse(draft, "Unsupported", unsupported(live.run))
    else:
        _prepare(draft, live.run)
        _advance(draft, live.run)
    return draft.seal()


def unsupported(run: DistillRun) -> str:
    """Why a valid run cannot be carried out by this version; empty where it can."""
    others = [f"{stage.name} ({stage.kind})" for stage in run.spec.stages if stage.kind not in EXECUTABLE]
    if not others:
        return ""
    return f"this version carries out stages of kind {', '.join(EXECUTABLE)} only, not {', '.join(others)}. Remove them, or upgrade."


def running_step(status: Status) -> Step | None:
    """The step whose child is, or should be, alive."""
    return next((step for step in status.steps if step.state == "Running"), None)


def holds_gpus(status: Status) -> bool:
    """Whether a run is admitted: from its first child until it is suspended or finished, pauses between attempts included."""
    return status.phase == "Running"


def _refuse(draft: Draft, reason: str, message: str) -> None:
    """A run that cannot be carried out. Before its first step that is a failure, which mending the spec undoes."""
    status = draft.status
    if status.started is None:
        draft.set(finished=status.finished or draft.now)
        draft.say("Failed", reason, message)
    elif status.phase in ("Succeeded", "Failed"):
        draft.said = conditions.kept(status)
    else:
        draft.say(status.phase, reason, message)
        draft.stall(reason, message)
    if draft.live.run is not None and draft.status.phase in ("Succeeded", "Failed"):
        _expire(draft, draft.live.run)


def _prepare(draft: Draft, run: DistillRun) -> None:
    """What holds for every valid run: its steps, its provenance, our finalizer."""
    status, spec = draft.status, run.spec
    if status.started is None:
        storage = spec.storage
        folder = "/".join(part for part in ("s3:/", storage.bucket, storage.prefix, paths.run(run)) if part)
        draft.set(
            finished=None,
            config=run.config_hash[:16],
            provenance=Provenance(
                git_sha=draft.settings.git_sha, image=draft.settings.images.trainer, config_hash=run.config_hash, folder=folder
            ),
            steps=tuple(changed(status.of(name) or Step(name=name), tokens_total=_planned(run, name)) for name in run.steps()),
        )
    wanted = spec.deletion_policy == "Delete"
    if draft.live.finalizer != wanted:
        draft.actions.append(Finalizer(wanted))


def _planned(run: DistillRun, step: str) -> int | None:
    return None if step == PREPROCESS else run.stage(step).tokens


def _advance(draft: Draft, run: DistillRun) -> None:
    """Carry the run as far as this one look allows."""
    step = next((step for step in draft.status.steps if step.state != "Succeeded"), None)
    if step is None:
        if draft.status.phase != "Succeeded":
            draft.set(finished=draft.now, progress="100%", tokens_per_second=None)
        draft.say("Succeeded", "Succeeded", _result(draft.status))
        _expire(draft, run)
    elif step.state == "Failed" and step.failures >= run.spec.runtime.attempts:
        draft.said = conditions.kept(draft.status)
        _expire(draft, run)
    elif step.state == "Running":
        if watch(draft, run, step):
            _advance(draft, run)
        elif draft.status.phase == "Failed":
            _expire(draft, run)
    elif run.spec.suspend:
        suspend(draft, step)
    elif step.state == "Retrying" and holds_gpus(draft.status) and step.retry_at and step.retry_at > draft.now:
        draft.wakes.append(step.retry_at)
        draft.say("Running", "Retrying", step.message)
    else:
        _start(draft, run, step)


def _start(draft: Draft, run: DistillRun, step: Step) -> None:
    """Make the next attempt, unless something it needs is not there."""
    if draft.seen.backend_missing:
        miss_backend(draft, "Running" if holds_gpus(draft.status) else "Pending")
        return
    if not holds_gpus(draft.status) and not run.spec.runtime.queue_name:
        if draft.verdict is None:
            raise ValueError(f"{run.metadata.name} is to start, and nobody has asked whether its GPUs are free")
        if not draft.verdict.admitted:
            draft.step(step.name, state="Queued")
            draft.say("Queued", "Queued", draft.verdict.arithmetic)
            if draft.verdict.hopeless:
                draft.stall("PoolTooSmall", draft.verdict.arithmetic)
            return
    attempt = step.attempt + 1
    child = ChildName(kind=child_kind(run, step.name).name, name=child_name(run, step.name, attempt))
    message = f"{step.name}: attempt {attempt} is being made as {child.kind} {child.name}"
    draft.step(
        step.name,
        state="Running",
        attempt=attempt,
        child=child,
        message=message,
        started=step.started or draft.now,
        progressed=draft.now,
        retry_at=None,
        finished=None,
    )
    draft.set(started=draft.status.started or draft.now, finished=None, step=step.name)
    draft.say("Running", "Starting", message)
    draft.actions.append(Create(step.name, attempt))
    if attempt > KEPT_ATTEMPTS:
        old = child_name(run, step.name, attempt - KEPT_ATTEMPTS)
        draft.actions.append(Delete(ChildName(kind=child.kind, name=old)))


def _expire(draft: Draft, run: DistillRun) -> None:
    """Delete a finished run when its time has come."""
    ttl, finished = run.spec.ttl_after_finished, draft.status.finished
    if ttl is None or finished is None:
        return
    end = finished + timedelta(seconds=ttl)
    if draft.now >= end:
        draft.actions.append(DeleteRun())
    else:
        draft.wakes.append(end)


def _end(draft: Draft) -> None:
    """The DistillRun is being deleted. Without our finalizer it goes by itself, and garbage collection takes its children."""
    live, child = draft.live, draft.seen.child
    draft.said = conditions.kept(draft.status)
    if not live.finalizer:
        return
    if live.run is None:
        draft.actions += [KeepBucket(f"the run's spec cannot be read ({live.invalid})"), Finalizer(False)]
    elif live.run.spec.deletion_policy == "Retain":
        draft.actions.append(Finalizer(False))
    elif child is not None and child.alive:
        draft.say(draft.status.phase, "Deleting", f"waiting for {child.kind} {child.name} to end before the bucket is cleared")
        if not child.deleting:
            draft.actions.append(Delete(ChildName(kind=child.kind, name=child.name, uid=child.uid)))
    else:
        draft.actions += [ClearBucket(), Finalizer(False)]


def _result(status: Status) -> str:
    where = f"; {status.checkpoint.manifest} describes the last checkpoint" if status.checkpoint else ""
    return f"all {len(status.steps)} steps have succeeded{where}"
