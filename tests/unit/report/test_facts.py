"""Time left, and the sizes and durations of the page."""

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.fakes import task_records
from vpmoe.api import DistillRun, load_run
from vpmoe.api.progress import Amount, Progress
from vpmoe.plan.plan import Assumptions, make_plan
from vpmoe.plan.teacher import KNOWN
from vpmoe.plan.throughput import CARDS
from vpmoe.report.facts import Figure, costs, data_size, duration, key_figures, story, time_left
from vpmoe.report.run_data import Activity, RunData, StepRecord
from vpmoe.rollout.task_record import TaskEvaluation

FULL = Path(__file__).parents[3] / "manifests" / "examples" / "full.yaml"
START = datetime(2026, 1, 1, tzinfo=UTC)
SLOWER = 2.0
"""How many times the planned hours the run below has taken."""


def planned_hours(run: DistillRun) -> dict[str, float]:
    """Hours of each step by the plan that `vpmoe plan` makes without a card."""
    card = CARDS["h100-80"]
    plan = make_plan(run, Assumptions(card, card.memory, KNOWN["gpt-oss-20b"]))
    return {step.step: step.hours for step in plan.steps if step.hours is not None}


@pytest.fixture
def data() -> RunData:
    """A run that has trained its first stage and half of its second."""
    run = load_run(FULL)
    done = {"vanilla": 1.0, "vanilla-evaluate": 1.0, "rescored": 0.5}
    hours = planned_hours(run)
    steps = []
    for name in run.steps():
        if run.role(name) != "report":
            stage = run.stage_of(name)
            total = stage.tokens if stage is not None else 0
            progress = Progress(
                step=name,
                attempt=1,
                state="Succeeded" if done.get(name) == 1 else "Running",
                updated=START,
                tokens=Amount(done=int(total * done.get(name, 0)), total=total) if name in done else None,
            )
            known = progress if name in done else None
            steps.append(StepRecord(name, run.role(name), stage and stage.name, known, ()))
    activities = [
        Activity(name, 1, START, START + timedelta(hours=SLOWER * share * hours[name]))
        for name, share in done.items()
    ]
    return RunData(run, "s3://x", START, tuple(steps), {}, {}, {}, (), (), (), tuple(activities))


def test_the_time_left_is_the_plans_times_what_training_took_longer(data: RunData) -> None:
    hours = planned_hours(data.run)
    evaluations = sum(hours[f"{stage}-evaluate"] for stage in ("rescored", "forced", "onpolicy"))
    left = hours["rescored"] / 2 + hours["forced"] + hours["onpolicy"] + evaluations
    assert time_left(data) == (pytest.approx(SLOWER * left), pytest.approx(SLOWER))  # float64


def test_the_time_left_of_a_run_that_has_not_trained_or_is_not_planned_is_not_known(data: RunData) -> None:
    assert time_left(dataclasses.replace(data, activities=())) is None
    tiny = data.run.spec.student.model_copy(update={"shape": "tiny"})
    run = data.run.model_copy(update={"spec": data.run.spec.model_copy(update={"student": tiny})})
    assert time_left(dataclasses.replace(data, run=run)) is None


@pytest.mark.parametrize(
    "skipped, text",
    [([3], "It skipped step 3: the"), (list(range(3, 10)), "It skipped step 3, 4, 5, 6, 7 and 2 more: the")],
)
def test_the_steps_that_a_stage_skipped_are_named(data: RunData, skipped: list[int], text: str) -> None:
    lines = tuple({"event": "skipped", "step": step, "tokens": 10 * step} for step in skipped)
    steps = tuple(
        dataclasses.replace(step, lines=lines) if step.name == "vanilla" else step for step in data.steps
    )
    (sentence,) = story(dataclasses.replace(data, steps=steps))
    assert text in sentence


def test_gpu_hours_are_those_of_all_gpus_of_the_steps_that_ran(data: RunData) -> None:
    rows = {row.step: row for row in costs(data)[0]}
    hours = planned_hours(data.run)["vanilla"]
    assert float(rows["vanilla"].gpu_hours) == pytest.approx(6 * SLOWER * hours, rel=0.05)  # two digits
    assert (rows["forced"].gpu_hours, rows["forced"].state) == ("–", "Waiting")


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0.001, "4 s"), (0.5, "30 min"), (1.65, "99 min"), (2, "2.0 h"), (47.9, "47.9 h"), (72, "3.0 days")],
)
def test_a_duration_has_the_unit_that_suits_it(hours: float, text: str) -> None:
    assert duration(hours) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (4_912_345, "4.91 MB"), (72.4e9, "72.4 GB")]
)
def test_a_size_has_the_unit_that_suits_it(size: int, text: str) -> None:
    assert data_size(size) == text


def test_right_answers_are_those_over_all_tasks_at_the_highest_effort(data: RunData) -> None:
    def shown(record: TaskEvaluation) -> Figure:
        figures = key_figures(dataclasses.replace(data, tasks={"vanilla": record}))
        (found,) = [figure for figure in figures if figure.name == "Right answers"]
        return found

    both = task_records.record("vanilla")
    assert shown(both) == Figure("Right answers", "45%", "to questions, at high effort; the teacher 95%")
    alone = task_records.record("vanilla", sides=("student",))
    assert shown(alone).note == "to questions, at high effort"
    assert not [figure for figure in key_figures(data) if figure.name == "Right answers"]
