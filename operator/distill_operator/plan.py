"""Decide what to do next about one DistillRun, from one observation of the cluster and the bucket.

No I/O and no clock.

reconcile.py observes, writes the status that is decided here, and only then executes the actions. Per-step
decisions are in step_logic.py, the run-level summary is in run_status.py, and conditions are in
conditions.py.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta

from distill_operator import conditions
from distill_operator.actions import (
    Action,
    ClearBucket,
    CreateChild,
    DeleteChild,
    DeleteRun,
    KeepBucket,
    ReportCleared,
    SetFinalizer,
)
from distill_operator.attempt import child_kind, child_name
from distill_operator.clear_job import CLEAR_SECONDS
from distill_operator.gpu_scheduler import Decision, needs_admission
from distill_operator.observe import ObservedChildren, ObservedRun
from distill_operator.plan_builder import Plan, PlanBuilder, StepContext, updated
from distill_operator.pod_diagnosis import TERMINATING
from distill_operator.pod_records import ProgressReading
from distill_operator.run_status import summarize_run
from distill_operator.settings import Settings
from distill_operator.step_logic import (
    check_stalled,
    monitor,
    pause_left,
    record_outcome,
    release,
    report_missing_backend,
    stop,
    suspend,
    wait_for_retry,
)
from distill_operator.step_timers import CLEARING, StepTimer
from vpmoe.api import DistillRun
from vpmoe.api.quantities import as_timedelta
from vpmoe.api.run import needs_gpus
from vpmoe.api.status import ChildRef, RunProvenance, StepStatus

CLEAR_MARGIN = timedelta(seconds=60)
"""How long after CLEAR_SECONDS the operator gives up on a Job that has not ended: one that is suspended, or
that somebody deletes again and again."""
KEPT_ATTEMPTS = 3
"""Children of a step that are kept for their logs, the latest included."""
NO_TIMERS: Mapping[str, StepTimer] = {}


def plan(
    observed: ObservedRun,
    children: ObservedChildren,
    readings: Mapping[str, ProgressReading],
    decision: Decision | None,
    settings: Settings,
    now: datetime,
    timers: Mapping[str, StepTimer] = NO_TIMERS,
) -> Plan:
    """Decide.

    `children` are those that Running steps name, `readings` the progress of these steps.

    `decision` is the GPU scheduler's about a run that holds no GPUs. Without one no step that needs GPUs
    starts, unless the run holds them or this operator's queue does not admit it.

    `timers` are those of the Running and Retrying steps. Of a step without one, durations follow from the
    wall clock, and onStall does not act.

    Always true, and each line has a test of the same name:
      a finished step is never created again, even if its child is gone;
      at most one child per step is alive, and it is the one that status names;
      the children alive use at most teacher.gpus + student.gpus;
      no step starts before the steps that it needs have succeeded;
      no child is created before status names it;
      no child with GPUs is created unless the run is admitted;
      no child is created while another object has its name;
      no step ends or starts again while its child may appear yet;
      when training has succeeded, the steps beside it are stopped and then count as succeeded;
      a run with an invalid spec never starts;
      a failing run is Failed only when none of its children is alive, with the first cause;
      a finished run does not change, except that a failed one continues if attempts is raised;
      attempts without progress are bounded, whatever ends them;
      a step that makes no progress becomes Stalled and stays it, however many attempts it takes;
      the bucket is cleared only when nothing can write to it any more;
      every message fits into the status.
    """
    if observed.unreadable:
        raise ValueError(f"{observed.name} has a status that this version cannot read: see plan_unreadable()")
    builder = PlanBuilder(observed, children, readings, decision, settings, now, timers)
    if observed.deleting:
        _finalize(builder)
    elif observed.run is None:
        _reject(builder, observed.invalid)
    else:
        _initialize(builder, observed.run)
        _advance(builder, observed.run)
    return builder.build()


def plan_unreadable(observed: ObservedRun) -> tuple[Action, ...]:
    """The actions for a run whose status this version cannot read: none, but its deletion goes on.

    Whether its folder may be cleared is not known, so it is kept.
    """
    if observed.deleting and observed.has_finalizer:
        return KeepBucket(f"the run's status cannot be read ({observed.invalid})"), SetFinalizer(False)
    return ()


def _reject(builder: PlanBuilder, message: str) -> None:
    """A run whose spec is invalid.

    Before its first step it fails, until the spec is corrected; later it stalls.
    """
    status = builder.status
    if status.started is None:
        builder.update(finished=status.finished or builder.now)
        builder.set_headline("Failed", "Invalid", message)
    elif status.phase in ("Succeeded", "Failed"):
        builder.headline = conditions.unchanged(status)
    else:
        builder.set_headline(status.phase, "Invalid", message)
        builder.set_stalled("Invalid", message)


def _initialize(builder: PlanBuilder, run: DistillRun) -> None:
    """Set what every valid run has: steps, provenance, and the finalizer if deletionPolicy needs it."""
    status, spec = builder.status, run.spec
    if status.started is None:
        storage = spec.storage
        folder = "/".join(part for part in ("s3:/", storage.bucket, storage.prefix, run.folder) if part)
        builder.update(
            config=run.config_hash[:16],
            provenance=RunProvenance(config_hash=run.config_hash, folder=folder),
            steps=tuple(
                updated(
                    status.step_status(name) or StepStatus(name=name), tokens_total=_planned_tokens(run, name)
                )
                for name in run.steps()
            ),
        )
    elif status.phase != "Succeeded":  # an older operator or another spec.runtime may have other steps
        builder.update(
            steps=tuple(
                status.step_status(name) or StepStatus(name=name, tokens_total=_planned_tokens(run, name))
                for name in run.steps()
            )
        )
    needs_finalizer = spec.deletion_policy == "Delete"
    if builder.observed.has_finalizer != needs_finalizer:
        builder.actions.append(SetFinalizer(needs_finalizer))


def _planned_tokens(run: DistillRun, step: str) -> int | None:
    return run.stage(step).tokens if run.role(step) == "train" else None


def _advance(builder: PlanBuilder, run: DistillRun) -> None:
    """Advance the run as far as this observation allows: first record every step's outcome, then decide what
    each step does.
    """
    runtime = run.spec.runtime
    failed = builder.status.phase == "Failed" and builder.status.failed_step(runtime) is not None
    if failed or builder.status.phase == "Succeeded":
        builder.headline = conditions.unchanged(builder.status)
    else:
        contexts = [StepContext(builder, run, name) for name in run.steps()]
        for context in contexts:
            if context.step.state == "Running":
                record_outcome(context)
        for context in contexts:
            if context.obsolete and context.step.state != "Succeeded":
                release(context)
        stopping = run.spec.suspend or builder.status.failed_step(runtime) is not None
        for context in contexts:
            _advance_step(context, stopping)
        summarize_run(builder, run, contexts)
        _report_small_pool(builder)
    if builder.status.phase in ("Succeeded", "Failed"):
        _expire(builder, run)


def _advance_step(context: StepContext, stopping: bool) -> None:
    """Decide about one step, after the outcomes of all are recorded.

    `stopping`: start nothing, and stop children that are alive.
    """
    step = context.step
    if step.state == "Succeeded" or context.obsolete or step.is_final(context.run.spec.runtime):
        return
    if step.state == "Running":
        (stop if stopping else monitor)(context)
    elif context.unmet_dependencies:
        context.update(message=f"waiting for {' and '.join(context.unmet_dependencies)}")
    elif stopping:
        suspend(context)
    elif step.state == "Retrying" and _must_wait(context, left := pause_left(context)):
        wait_for_retry(context, left)
    else:
        _start(context)


def _must_wait(context: StepContext, left: timedelta) -> bool:
    """Whether a Retrying step waits.

    One that ended just now waits one reconcile even without a pause, so that its status is written.
    """
    return left > timedelta() or context.before.state != "Retrying"


def _start(context: StepContext) -> None:
    """Start the next attempt, unless the backend or the GPUs are missing."""
    builder, run, step = context.builder, context.run, context.step
    holds_gpus = builder.observed.status.holds_gpus
    if builder.children.backend_missing:
        report_missing_backend(context, "Running" if holds_gpus else "Pending")
        return
    if needs_gpus(step.name) and not holds_gpus and needs_admission(run, builder.settings):
        if builder.decision is None:  # preprocessing has succeeded just now: the next reconcile has one
            message = f"{step.name}: waiting until the free GPUs are counted"
            context.update(message=message)
            context.summarize("Starting", message, "Queued" if builder.status.gpu_step_started else "Running")
            return
        if not builder.decision.admitted:
            context.update(state="Queued")
            context.summarize("Queued", builder.decision.arithmetic, "Queued")
            if builder.decision.unschedulable:
                context.set_stalled("PoolTooSmall", builder.decision.arithmetic)
            return
    attempt = step.attempt + 1
    child = ChildRef(kind=child_kind(run, step.name).name, name=child_name(run, step.name, attempt))
    message = f"Creating {child.kind} {child.name} (attempt {attempt})"
    context.update(
        state="Running",
        attempt=attempt,
        child=child,
        message=message,
        started=step.started or builder.now,
        # That a step starts again is no progress. That a person lets it start again counts from now.
        progressed=step.progressed if step.state == "Retrying" else builder.now,
        unreadable_since=None,
        retry_at=None,
        finished=None,
        resumed=None,
        outcome=None,
    )
    builder.update(started=builder.status.started or builder.now)
    context.summarize("Starting", message)
    check_stalled(context, "NoProgress", message)
    context.add(CreateChild(step.name, attempt))
    if attempt > KEPT_ATTEMPTS:
        old = child_name(run, step.name, attempt - KEPT_ATTEMPTS)
        context.add(DeleteChild(ChildRef(kind=child.kind, name=old)))


def _report_small_pool(builder: PlanBuilder) -> None:
    """A run that preprocesses, and whose later steps the pool can never hold, is Stalled already now.

    Without a decision, for instance of an operator that has just started, that stays as it was.
    """
    decision, stalled = builder.decision, builder.observed.status.condition("Stalled")
    if builder.status.phase != "Running" or builder.status.holds_gpus or builder.headline.stalled:
        return
    if decision is not None and decision.unschedulable:
        builder.set_stalled("PoolTooSmall", decision.arithmetic)
    elif decision is None and stalled is not None and stalled.reason == "PoolTooSmall":
        builder.set_stalled(stalled.reason, stalled.message)


def _expire(builder: PlanBuilder, run: DistillRun) -> None:
    """Delete a finished run when ttlAfterFinished has passed since it finished, by the wall clock: the same
    as Kubernetes does with a Job's ttlSecondsAfterFinished. A run that finished in the future, because a
    clock was wrong, is deleted later.
    """
    ttl, finished = run.spec.ttl_after_finished, builder.status.finished
    if ttl is None or finished is None:
        return
    end = finished + as_timedelta(ttl)
    if builder.now >= end:
        builder.actions.append(DeleteRun())
    else:
        builder.requeue_at(end)


def _finalize(builder: PlanBuilder) -> None:
    """The DistillRun is being deleted.

    Without our finalizer there is nothing to do: garbage collection deletes the children.
    """
    observed, observations = builder.observed, builder.children.by_step.values()
    alive = [found.child for found in observations if found.child is not None and found.child.alive]
    pending = builder.status.clearing is None and any(found.may_appear for found in observations)
    builder.headline = conditions.unchanged(builder.status)
    if not observed.has_finalizer:
        return
    if observed.run is None:
        builder.actions += [
            KeepBucket(f"the run's spec is invalid ({observed.invalid})"),
            SetFinalizer(False),
        ]
    elif observed.run.spec.deletion_policy == "Retain" and builder.children.clear.may_appear:
        builder.set_headline(
            builder.status.phase,
            "Deleting",
            "deletionPolicy is Retain now: waiting until the Job that would delete the run's folder cannot "
            "appear any more, because a request to create it had no answer",
        )
        builder.polls = True
    elif observed.run.spec.deletion_policy == "Retain":
        _stop_clearing(builder)
        builder.actions.append(SetFinalizer(False))
    elif alive:
        names = " and ".join(f"{child.kind} {child.name}" for child in alive)
        builder.set_headline(
            builder.status.phase,
            "Deleting",
            f"Waiting for {names} to terminate before the run's folder is deleted from the bucket",
        )
        builder.actions += [DeleteChild(child.ref) for child in alive if not child.deleting]
    elif pending:
        builder.set_headline(
            builder.status.phase,
            "Deleting",
            "Waiting until no further Job can appear before the run's folder is deleted from the bucket: a "
            "request to create one had no answer",
        )
        builder.polls = True
    elif builder.status.started is None:  # no job has run, so there is no folder
        builder.actions.append(SetFinalizer(False))
    else:
        _clear_bucket(builder)


def _clear_bucket(builder: PlanBuilder) -> None:
    """Have a Job delete the run's folder, and end the deletion of the run when that Job has ended, or when it
    had time enough.
    """
    begun = builder.status.clearing or builder.now
    builder.update(clearing=begun)
    observation, before = builder.children.clear, builder.observed.status.message
    job, why = observation.child, ""
    timer = builder.timers.get(CLEARING)
    waited = timer.idle if timer is not None else builder.now - begun
    left = timedelta(seconds=CLEAR_SECONDS) + CLEAR_MARGIN - waited
    if job is not None and job.state == "Succeeded":
        parts = job.record.progress.parts if job.record and job.record.progress else None
        builder.actions += [ReportCleared(parts.done if parts else None), SetFinalizer(False)]
        return
    if observation.name_conflict is not None:
        why = observation.name_conflict.message
    elif observation.namespace_ends:
        why = "its namespace is being deleted, so the Job that would delete the folder cannot be created"
    elif job is not None and job.failure is not None:
        why = f"Job {job.name} has failed: {job.failure.message}"
        if job.failure.kind == "Interrupted":  # its pods are gone, and what they waited for with them
            why += f". The last that is known: {before}"
    elif left <= timedelta():
        why = f"it could not be deleted within {CLEAR_SECONDS} s. The last that is known: {before}"
    if why:
        _stop_clearing(builder)
        builder.actions += [KeepBucket(why), SetFinalizer(False)]
        return
    builder.requeue_at(builder.now + left)
    builder.polls = True
    doing = observation.create_error or (job.message if job is not None else "")
    message = "Deleting the run's folder from the bucket"
    ends = doing.endswith(TERMINATING) or (job is not None and job.state == "Ending")
    if ends and before.startswith(message):
        message = before  # what its pods waited for, which nobody can read any more when they are gone
    elif doing:
        message += f": {doing}"
    builder.set_headline(builder.status.phase, "Deleting", message)
    if job is None:
        builder.actions.append(ClearBucket())


def _stop_clearing(builder: PlanBuilder) -> None:
    """Delete the Job that deletes the run's folder, if it may still do so."""
    job = builder.children.clear.child
    if job is not None and job.alive:
        builder.actions.append(DeleteChild(job.ref))
