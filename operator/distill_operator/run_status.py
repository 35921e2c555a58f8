"""Run-level status from the steps: phase, message, columns of kubectl get, percentage done, and the end of
the run. Pure.

Several steps may run at once. The headline is that of the step that trains, whose speed and loss people
watch. The run is Stalled if any step is. Per-step decisions are in step_logic.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from distill_operator.estimate import estimated_end
from distill_operator.plan_builder import PlanBuilder, StepContext, StepSummary
from vpmoe.api import DistillRun, Stage
from vpmoe.api.run import INIT, RESCORE
from vpmoe.api.runtime import Role
from vpmoe.api.status import Status, StepStatus

ROLE_SHARES: Mapping[Role, float] = {"preprocess": 0.05, "rescore": 0.05, "evaluate": 0.01}
"""Share of the whole run that each step of these roles counts for. The stages divide the rest by their
tokens; init, exports, reports and steps beside a trainer count for nothing."""


def summarize_run(builder: PlanBuilder, run: DistillRun, contexts: Sequence[StepContext]) -> None:
    """Set the run's status from its steps, given in order.

    A failed step fails the run once no child is alive.
    """
    status, cause = builder.status, builder.status.failed_step(run.spec.runtime)
    if all(step.state == "Succeeded" for step in status.steps):
        builder.update(finished=builder.now, progress="100%", tokens_per_second=None)
        builder.set_headline("Succeeded", "Succeeded", _success_message(status))
    elif cause is not None and not status.running:
        builder.update(
            finished=builder.now, progress=percent_done(run, status), tokens_per_second=None, step=cause.name
        )
        builder.set_headline("Failed", cause.reason, cause.message)
    else:
        builder.update(finished=None, progress=percent_done(run, status))
        summaries = builder.summaries
        _choose_headline(
            builder, cause, [(step, summaries[step.name]) for step in contexts if step.name in summaries]
        )
    _set_eta(builder, run)


def percent_done(run: DistillRun, status: Status) -> str:
    """Share of the whole run that is done, as a percentage, rounded down. Only a finished run shows 100%."""
    planned = sum(stage.tokens for stage in run.spec.stages)
    trained = sum(_tokens_done(stage, status) for stage in run.spec.stages) / planned
    shares = {
        step: ROLE_SHARES[role]
        for step in run.steps()
        if (role := run.role(step)) in ROLE_SHARES and not run.serves_trainer(step)
    }
    done = sum(share * _parts_done(name, status) for name, share in shares.items())
    return f"{min(99, int(100 * (done + (1 - sum(shares.values())) * trained)))}%"


def _choose_headline(
    builder: PlanBuilder, cause: StepStatus | None, summaries: list[tuple[StepContext, StepSummary]]
) -> None:
    """Take the headline of the last step, in order, that runs; if none runs, of the last that waits."""
    running = [found for found in summaries if found[1].phase == "Running"]
    context, summary = (running or summaries)[-1]
    message = summary.message
    if cause is not None:
        message += f", because {cause.message}"
    elif stage := _stage_waiting_for(builder, context):
        message += f"; stage {stage} is waiting for it"
    elif summary.reason == "Running":
        message += "".join(
            f"; {other.message}"
            for step, other in running
            if step.serves_trainer and other.reason != "Running"
        )
    builder.set_headline(summary.phase, summary.reason, message)
    stalled = [found.stalled for _, found in [(context, summary), *summaries] if found.stalled is not None]
    builder.headline = replace(builder.headline, stalled=stalled[0] if stalled else None)
    _set_columns(builder, context)


def _stage_waiting_for(builder: PlanBuilder, context: StepContext) -> str:
    """The stage that waits for nothing but this step, if it is init or rescoring; otherwise empty."""
    if context.name not in (INIT, RESCORE):
        return ""
    pending = [step.name for step in builder.status.steps if step.state == "Pending"]
    trainers = [replace(context, name=name) for name in pending if context.run.role(name) == "train"]
    return next((stage.name for stage in trainers if stage.unmet_dependencies == [context.name]), "")


def _set_columns(builder: PlanBuilder, context: StepContext) -> None:
    """Set STEP, TOKENS/S and LOSS.

    If progress cannot be read, the last known speed of the same step is kept. A training step that begins
    to lead clears the loss of the stage before: the two may be different quantities.
    """
    progress, another_step = context.report, builder.status.step != context.name
    if context.step.state != "Running":
        builder.update(tokens_per_second=None)
    elif progress is not None or another_step:
        builder.update(tokens_per_second=progress.tokens_per_second if progress else None)
    if another_step and context.run.role(context.name) == "train":
        builder.update(loss=progress.loss if progress else None)
    if context.step.attempt:
        builder.update(step=context.name)


def _set_eta(builder: PlanBuilder, run: DistillRun) -> None:
    """Set ETA while a stage trains. Between stages it stays, and a run that does not run has none."""
    end = estimated_end(run, builder.status)
    if builder.status.phase != "Running":
        builder.update(eta=None)
    elif end is not None:
        builder.update(eta=f"{end:%Y-%m-%dT%H:%MZ}")


def _success_message(status: Status) -> str:
    checkpoint = f". Last checkpoint: {status.checkpoint.manifest}" if status.checkpoint else ""
    model = f". Model: {status.model}" if status.model else ""
    return f"All {len(status.steps)} steps have succeeded{checkpoint}{model}"


def _parts_done(name: str, status: Status) -> float:
    step = status.step_status(name)
    if step is None:
        return 0.0
    return 1.0 if step.state == "Succeeded" else (step.parts_done or 0) / max(step.parts_total or 1, 1)


def _tokens_done(stage: Stage, status: Status) -> int:
    step = status.step_status(stage.name)
    if step is None:
        return 0
    return stage.tokens if step.state == "Succeeded" else min(step.tokens_done or 0, stage.tokens)
