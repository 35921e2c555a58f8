"""What the steps of a run make of it together: phase, message and columns, and how it ends. Part of plan.py's decision, as pure as that.

Several steps may be at work at once. The run then speaks of the one that trains, whose speed and loss people watch, and is Stalled where
any of them is.
"""

from collections.abc import Sequence
from dataclasses import replace

from distill_operator.plan_builder import PlanBuilder, StepContext, StepSummary
from distill_operator.share import share
from vpmoe.api import DistillRun
from vpmoe.api.run import RESCORE
from vpmoe.api.status import Status, StepStatus


def failing(status: Status, run: DistillRun) -> StepStatus | None:
    """The step whose failure ends the run, the first where there are several. Raising runtime.attempts makes it one that may go on."""
    failed = [
        step for step in status.steps if step.state == "Failed" and step.failures >= run.spec.runtime.attempts
    ]
    return min(failed, key=lambda step: step.finished.timestamp() if step.finished else 0.0, default=None)


def conclude(draft: PlanBuilder, run: DistillRun, works: Sequence[StepContext]) -> None:
    """The status of the run, from what its steps, in their order, have come to. A failure is the run's once nothing is alive."""
    status, cause = draft.status, failing(draft.status, run)
    if all(step.state == "Succeeded" for step in status.steps):
        draft.set(finished=draft.now, progress="100%", tokens_per_second=None)
        draft.say("Succeeded", "Succeeded", _result(status))
    elif cause is not None and not status.running:
        draft.set(finished=draft.now, progress=share(run, status), tokens_per_second=None, step=cause.name)
        draft.say("Failed", cause.reason, cause.message)
    else:
        draft.set(finished=None, progress=share(run, status))
        _lead(draft, cause, [(work, draft.words[work.name]) for work in works if work.name in draft.words])


def _lead(
    draft: PlanBuilder, cause: StepStatus | None, spoken: list[tuple[StepContext, StepSummary]]
) -> None:
    """Let one of the steps that spoke speak for the run: of those at work, or else of those that wait, the one furthest on."""
    at_work = [said for said in spoken if said[1].phase == "Running"]
    work, word = (at_work or spoken)[-1]
    message = word.message
    if cause is not None:
        message += f", because {cause.message}"
    elif waiting := _waiting(draft, work):
        message += f"; {waiting} waits for it"
    elif word.reason == "Running":
        message += "".join(
            f"; {other.message}" for beside, other in at_work if beside.beside and other.reason != "Running"
        )
    draft.say(word.phase, word.reason, message)
    stalled = [found.stalled for _, found in [(work, word), *spoken] if found.stalled is not None]
    draft.said = replace(draft.said, stalled=stalled[0] if stalled else None)
    _show(draft, work)


def _waiting(draft: PlanBuilder, work: StepContext) -> str:
    """The stage that could train were it not for rescoring, which is at `work` alone; empty where it is not so."""
    if work.name != RESCORE:
        return ""
    pending = [step.name for step in draft.status.steps if step.state == "Pending"]
    stages = [replace(work, name=name) for name in pending if work.run.role(name) == "train"]
    return next((stage.name for stage in stages if stage.lacking == [RESCORE]), "")


def _show(draft: PlanBuilder, work: StepContext) -> None:
    """The columns STEP and TOKENS/S. A speed that the bucket does not tell at the moment stays, unless it was another step's."""
    progress, another = work.reading.progress, draft.status.step != work.name
    if work.step.state != "Running":
        draft.set(tokens_per_second=None)
    elif progress is not None or another:
        draft.set(tokens_per_second=progress.tokens_per_second if progress else None)
    if work.step.attempt:
        draft.set(step=work.name)


def _result(status: Status) -> str:
    where = f"; {status.checkpoint.manifest} describes the last checkpoint" if status.checkpoint else ""
    return f"all {len(status.steps)} steps have succeeded{where}"
