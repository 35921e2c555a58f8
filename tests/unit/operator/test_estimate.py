"""The estimate of a run's end: by the speed of the stage that trains, and by the plan for what follows."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from distill_operator.estimate import estimated_end

from tests.fakes.simulated_cluster import SimulatedCluster, progress, training_run
from vpmoe.api import load_run
from vpmoe.api.card import parse_card_memory
from vpmoe.api.status import Status, StepStatus
from vpmoe.plan.plan import Assumptions, make_plan
from vpmoe.plan.teacher import KNOWN
from vpmoe.plan.throughput import CARDS

FULL = load_run(Path(__file__).parents[3] / "manifests" / "examples" / "full.yaml")
SINCE = datetime(2026, 1, 1, tzinfo=UTC)
TWO_STAGES = [{"name": name, "kind": "Vanilla", "tokens": 1000} for name in ("vanilla", "second")]


def training(stage: str, speed: float | None, **step: Any) -> Status:
    """The status of FULL while a stage trains."""
    known = {"state": "Running", "progressed": SINCE, "tokens_total": FULL.stage(stage).tokens} | step
    return Status(
        phase="Running", step=stage, tokens_per_second=speed, steps=(StepStatus(name=stage, **known),)
    )


@pytest.mark.parametrize("slower", [1.0, 2.5])
@pytest.mark.parametrize("stage", ["vanilla", "onpolicy"])
def test_later_steps_take_the_plans_time_times_the_factor_of_the_present_stage(
    stage: str, slower: float
) -> None:
    card, memory = CARDS["h200-141"], parse_card_memory("141G")  # as the example says
    plan = make_plan(FULL, Assumptions(card, memory, KNOWN["gpt-oss-20b"]))
    hours = {row.step: row.hours for row in plan.steps}
    speed = next(row.tokens_per_second for row in plan.steps if row.step == stage) / slower
    total = FULL.stage(stage).tokens
    order = [step for step in FULL.steps() if step in hours]
    later = sum(hours[step] for step in order[order.index(stage) + 1 :])
    expected = SINCE + timedelta(seconds=(total - total // 4) / speed, hours=slower * later)
    found = estimated_end(FULL, training(stage, speed, tokens_done=total // 4))
    # The status rounds the speed to six digits.
    assert found is not None and abs(found - expected) <= 1e-5 * (expected - SINCE)


@pytest.mark.parametrize(
    "status",
    [
        pytest.param(Status(), id="not started"),
        pytest.param(training("vanilla", None), id="no speed yet"),
        pytest.param(training("vanilla", 0.0), id="stands still"),
        pytest.param(training("vanilla", 1e-300), id="hardly moves"),
        pytest.param(training("vanilla", 10.0, progressed=None), id="no progress yet"),
        pytest.param(training("vanilla", 10.0, state="Retrying"), id="between two attempts"),
    ],
)
def test_an_end_that_is_not_known_is_not_estimated(status: Status) -> None:
    assert estimated_end(FULL, status) is None


def trained_at(cluster: SimulatedCluster, done: int, speed: float) -> str | None:
    """ETA after a stage has reported its tokens and its speed."""
    cluster.set_child_state("Running")
    cluster.set_progress(progress("vanilla", iteration=done, done=done, tokensPerSecond=speed))
    return cluster.reconcile().status.eta


def test_the_last_stage_ends_at_its_present_speed_and_the_estimate_goes_with_the_run() -> None:
    cluster = training_run()
    assert cluster.status.eta is None
    end = cluster.now + timedelta(seconds=500 / 0.25)
    assert trained_at(cluster, 500, 0.25) == f"{end:%Y-%m-%dT%H:%MZ}"
    cluster.advance(30)
    assert cluster.reconcile().status.eta == f"{end:%Y-%m-%dT%H:%MZ}", "nothing is known that is new"
    cluster.set_child_state("Succeeded")
    cluster.set_progress(progress("vanilla", state="Succeeded", iteration=1000, done=1000))
    assert (cluster.reconcile().status.phase, cluster.status.eta) == ("Succeeded", None)


def test_a_run_whose_later_stages_are_not_planned_has_no_estimate() -> None:
    """Speeds of tiny were never measured."""
    assert trained_at(training_run(stages=TWO_STAGES), 500, 0.25) is None


def test_a_suspended_run_has_no_estimate() -> None:
    cluster = training_run()
    assert trained_at(cluster, 500, 0.25) is not None
    cluster.spec["suspend"] = True
    cluster.reconcile()
    cluster.remove_children()
    for _ in range(3):
        cluster.reconcile()
    assert (cluster.status.phase, cluster.status.eta) == ("Suspended", None)
