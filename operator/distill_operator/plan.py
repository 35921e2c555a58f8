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
    ClearBucket,
    CreateChild,
    DeleteChild,
    DeleteRun,
    KeepBucket,
    SetFinalizer,
)
from distill_operator.attempt import child_kind, child_name
from distill_operator.gpu_scheduler import Decision
from distill_operator.observe import ObservedChildren, ObservedRun
from distill_operator.plan_builder import Plan, PlanBuilder, StepContext, updated
from distill_operator.run_status import summarize_run
from distill_operator.settings import Settings
from distill_operator.step_logic import (
    monitor,
    record_outcome,
    release,
    report_missing_backend,
    stop,
    suspend,
)
from distill_operator.step_progress import ProgressReading
from vpmoe.api import DistillRun
from vpmoe.api.status import ChildRef, RunProvenance, StepStatus
from vpmoe.storage import paths

KEPT_ATTEMPTS = 3
"""Children of a step that are kept for their logs, the latest included."""


def plan(
    observed: ObservedRun,
    children: ObservedChildren,
    readings: Mapping[str, ProgressReading],
    decision: Decision | None,
    settings: Settings,
    now: datetime,
) -> Plan:
    """Decide.

    `children` are those that Running steps name, `readings` the progress of these steps.

    `decision` is the GPU scheduler's about a run that holds no GPUs; None for a run that holds them or will
    not start.

    Always true, and each line has a test of the same name:
      a finished step is never created again, even if its child is gone;
      at most one child per step is alive, and it is the one that status names;
      the children alive use at most teacher.gpus + student.gpus;
      no step starts before the steps that it needs have succeeded;
      no child is created before status names it;
      no child is created unless the run is admitted;
      no child is created while another object has its name;
      when training has succeeded, the steps beside it are stopped and then count as succeeded;
      a run with an invalid spec never starts;
      a failing run is Failed only when none of its children is alive, with the first cause;
      a finished run does not change, except that a failed one continues if attempts is raised;
      the bucket is cleared only when nothing can write to it any more;
      every message fits into the status.
    """
    builder = PlanBuilder(observed, children, readings, decision, settings, now)
    if observed.deleting:
        _finalize(builder)
    elif observed.run is None:
        _reject(builder, observed.invalid)
    else:
        _initialize(builder, observed.run)
        _advance(builder, observed.run)
    return builder.build()


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
        folder = "/".join(part for part in ("s3:/", storage.bucket, storage.prefix, paths.run(run)) if part)
        builder.update(
            config=run.config_hash[:16],
            provenance=RunProvenance(
                git_sha=builder.settings.git_sha,
                image=builder.settings.images.trainer,
                config_hash=run.config_hash,
                folder=folder,
            ),
            steps=tuple(
                updated(
                    status.step_status(name) or StepStatus(name=name), tokens_total=_planned_tokens(run, name)
                )
                for name in run.steps()
            ),
        )
    elif status.phase != "Succeeded":  # an older operator may have started it with fewer steps
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
    attempts = run.spec.runtime.attempts
    failed = builder.status.phase == "Failed" and builder.status.failed_step(attempts) is not None
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
        stopping = run.spec.suspend or builder.status.failed_step(attempts) is not None
        for context in contexts:
            _advance_step(context, stopping)
        summarize_run(builder, run, contexts)
    if builder.status.phase in ("Succeeded", "Failed"):
        _expire(builder, run)


def _advance_step(context: StepContext, stopping: bool) -> None:
    """Decide about one step, after the outcomes of all are recorded.

    `stopping`: start nothing, and stop children that are alive.
    """
    step, builder = context.step, context.builder
    if (
        step.state == "Succeeded"
        or context.obsolete
        or (step.state == "Failed" and step.failures >= context.run.spec.runtime.attempts)
    ):
        return
    if step.state == "Running":
        (stop if stopping else monitor)(context)
    elif context.unmet_dependencies:
        context.update(message=f"waiting for {' and '.join(context.unmet_dependencies)}")
    elif stopping:
        suspend(context)
    elif step.state == "Retrying" and step.retry_at and _must_wait(context, step.retry_at):
        builder.requeue_at(step.retry_at)
        context.summarize("Retrying", step.message)
    else:
        _start(context)


def _must_wait(context: StepContext, until: datetime) -> bool:
    """Whether a Retrying step waits.

    One that ended just now waits one reconcile even without a pause, so that its status is written.
    """
    builder = context.builder
    return builder.observed.status.holds_gpus and (until > builder.now or context.before.state != "Retrying")


def _start(context: StepContext) -> None:
    """Start the next attempt, unless the backend or the GPUs are missing."""
    builder, run, step = context.builder, context.run, context.step
    holds_gpus = builder.observed.status.holds_gpus
    if builder.children.backend_missing:
        report_missing_backend(context, "Running" if holds_gpus else "Pending")
        return
    if not holds_gpus and not run.spec.runtime.queue_name:
        if builder.decision is None:
            raise ValueError(f"{run.metadata.name} is to start and holds no GPUs: plan() needs a Decision")
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
        progressed=builder.now,
        retry_at=None,
        finished=None,
    )
    builder.update(started=builder.status.started or builder.now)
    context.summarize("Starting", message)
    context.add(CreateChild(step.name, attempt))
    if attempt > KEPT_ATTEMPTS:
        old = child_name(run, step.name, attempt - KEPT_ATTEMPTS)
        context.add(DeleteChild(ChildRef(kind=child.kind, name=old)))


def _expire(builder: PlanBuilder, run: DistillRun) -> None:
    """Delete a finished run when ttlAfterFinished has passed."""
    ttl, finished = run.spec.ttl_after_finished, builder.status.finished
    if ttl is None or finished is None:
        return
    end = finished + timedelta(seconds=ttl)
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
    builder.headline = conditions.unchanged(builder.status)
    if not observed.has_finalizer:
        return
    if observed.run is None:
        builder.actions += [
            KeepBucket(f"the run's spec is invalid ({observed.invalid})"),
            SetFinalizer(False),
        ]
    elif observed.run.spec.deletion_policy == "Retain":
        builder.actions.append(SetFinalizer(False))
    elif alive:
        names = " and ".join(f"{child.kind} {child.name}" for child in alive)
        builder.set_headline(
            builder.status.phase,
            "Deleting",
            f"Waiting for {names} to terminate before the run's folder is deleted from the bucket",
        )
        builder.actions += [
            DeleteChild(ChildRef(kind=child.kind, name=child.name, uid=child.uid))
            for child in alive
            if not child.deleting
        ]
    else:
        builder.actions += [ClearBucket(), SetFinalizer(False)]
