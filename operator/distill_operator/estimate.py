"""When a run will have trained and evaluated all of its stages, about. Pure.

The stage that trains ends after its tokens that are left, at its present speed. For what follows it is the
plan (`vpmoe plan`), times the factor by which that stage is slower than planned.
"""

from datetime import datetime, timedelta

from vpmoe.api import DistillRun
from vpmoe.api.card import parse_card_memory
from vpmoe.api.status import Status
from vpmoe.plan.plan import Assumptions, StepPlan, plan_steps
from vpmoe.plan.teacher import known_teacher
from vpmoe.plan.throughput import suggested_card

LONGEST = 10 * 365 * 86_400.0
"""Seconds from which an estimate says nothing."""


def estimated_end(run: DistillRun, status: Status) -> datetime | None:
    """The time, from the run's status while a stage trains.

    It counts from the stage's last progress, so that it stays the same until the next. None if no stage
    trains, its speed is not known yet, or the plan does not know the speed of a step that follows.
    """
    step = status.step_status(status.step or "")
    if step is None or step.state != "Running" or run.role(step.name) != "train":
        return None
    speed, since, total = status.tokens_per_second, step.progressed, step.tokens_total
    if not speed or since is None or total is None:
        return None
    seconds = max(0, total - (step.tokens_done or 0)) / speed
    rows = _planned_steps(run)
    place = [row.step for row in rows].index(step.name)
    for row in rows[place + 1 :]:
        planned = rows[place].tokens_per_second
        if row.hours is None or planned is None:
            return None
        seconds += 3600 * row.hours * planned / speed
    return since + timedelta(seconds=round(seconds)) if seconds < LONGEST else None


def _planned_steps(run: DistillRun) -> list[StepPlan]:
    """The steps of the run's plan, in order; rescoring is before the stages, beside which it runs."""
    written = run.spec.runtime.gpu_memory
    memory = parse_card_memory(written) if written else None
    card = suggested_card(memory)
    return plan_steps(run, Assumptions(card, memory or card.memory, known_teacher(run.spec.teacher.model)))
