"""Figures of a short recipe, by hand: what counts of a trainer's and a worker's lines, and the table."""

from typing import Any

import pytest

from benchmarks.recipe_figures import (
    Compared,
    TrainerFigures,
    WorkerFigures,
    later_share,
    step_to_sampling,
)
from vpmoe.report.run_data import line_time


def line(event: str, at: int, seconds: float, **more: Any) -> dict[str, Any]:
    """A line that was written `at` seconds after a minute's begin."""
    return {"event": event, "time": f"2026-01-01T00:00:{at:02d}Z", "seconds": seconds, **more}


def test_the_first_step_of_an_attempt_and_evaluations_do_not_count() -> None:
    """Two attempts; the later steps of the first take 10 s with 2 s between them and 3 s of an evaluation,
    that of the second 4 s."""
    lines = [
        line("step", 10, 9.0, step=1, tokens=1000, waitRollouts=8.0),
        line("evaluation", 13, 3.0),
        line("step", 20, 5.0, step=2, tokens=1600, waitRollouts=1.0, waitScores=1.0),
        line("step", 25, 5.0, step=3, tokens=2000, waitRollouts=0.0),
        line("started", 30, 0.0),
        line("step", 40, 9.0, step=4, tokens=2500, waitRollouts=6.0),
        line("step", 44, 4.0, step=5, tokens=2800, waitRollouts=3.0),
    ]
    found = TrainerFigures.of(lines)
    assert found.steady == pytest.approx((600 + 400 + 300) / (7 + 5 + 4))
    assert found.busy == pytest.approx(1 - (2 + 0 + 3) / 16)
    assert found.pauses == pytest.approx({1: 2.0, 2: 0.0, 4: 0.0})
    assert found.waits == {"rollouts": 18.0, "scores": 1.0}
    assert found.seconds == 9 + 5 + 5 + 9 + 4 + 2
    alone = TrainerFigures.of(lines[:1])
    assert (alone.steady, alone.busy, alone.working) == (None, None, None)


def test_training_waits_for_uploads_between_steps() -> None:
    """Three steps with 6 and 1 s between them, of which 4 and 1 s are waits for uploads; the last one's wait
    comes before no step."""
    lines = [
        line("step", 10, 9.0, step=1, tokens=1000, waitRollouts=8.0, waitScores=0.0, waitUpload=4.0),
        line("step", 20, 4.0, step=2, tokens=1600, waitRollouts=1.0, waitScores=1.0, waitUpload=1.0),
        line("step", 26, 5.0, step=3, tokens=2000, waitRollouts=0.0, waitScores=0.0, waitUpload=3.0),
    ]
    found = TrainerFigures.of(lines)
    assert found.waits == {"rollouts": 9.0, "scores": 1.0, "uploads": 8.0}
    assert found.pauses == pytest.approx({1: 2.0, 2: 0.0})
    assert found.seconds == pytest.approx(9 + 4 + 5 + 8 + 2)
    assert found.steady == pytest.approx(1000 / 16)
    assert found.uploads == pytest.approx(5 / 16) and found.busy == pytest.approx(1 - (5 + 2) / 16)
    assert found.working == pytest.approx((600 / 2 + 400 / 5) / 2)


def test_sampling_begins_before_the_wait_for_the_bucket() -> None:
    """Versions that training began to copy at a minute's begin, of which the sampler looked once for 3."""
    began = line_time(line("step", 0, 0.0)).timestamp()
    load = {"seconds": 1.0}
    lines = [
        line("window", 20, 4.0, version=1, load=load, waitWeights=3.0, waitUpload=9.0),
        line("window", 21, 4.0, version=1, load=None, waitWeights=0.0, waitUpload=0.0),
        line("window", 30, 4.0, version=3, load=load, waitWeights=0.01, waitUpload=2.0),
        line("window", 40, 4.0, version=5, load=load, waitWeights=3.0, waitUpload=0.0),
    ]
    copied = {1: began, 3: began}
    assert step_to_sampling(copied, lines) == pytest.approx({1: 7.0, 3: 24.0})
    assert step_to_sampling(copied, lines, waited=True) == pytest.approx({1: 7.0})


def test_a_worker_is_busy_for_the_work_after_its_first_batch() -> None:
    """Windows of one version have the batch's seconds each. Their time is after the wait for the bucket."""
    lines = [
        line(
            "window",
            at,
            seconds,
            tokensPerSecond=10.0,
            waitWeights=0.5,
            waitUpload=waited,
            load={"seconds": 0.25} if first else None,
        )
        for at, seconds, waited, first in (
            (6, 5.0, 1.0, True),
            (7, 5.0, 0.0, False),
            (16, 4.0, 0.0, True),
            (29, 4.0, 4.0, True),
        )
    ]
    found = WorkerFigures.of_sampler(lines)
    assert found.busy == pytest.approx(8 / 20)
    assert (found.windows, found.seconds, found.tokens) == (4, 13.0, 130.0)
    assert found.waits == {"weights": 1.5, "loading them": 0.75, "uploads": 5.0}
    assert later_share([(5, 5.0), (15, 8.0), (15, 8.0)], 2) == pytest.approx(0.8)
    assert later_share([(5, 5.0)], 1) is None


@pytest.mark.parametrize(
    "measured, planned, row",
    [
        (1190.0, 1000.0, "| tokens/s | 1,190 | 1,000 | +19% |"),
        (790.0, 1000.0, "| tokens/s | 790 | 1,000 | **-21%** |"),
        (790.0, None, "| tokens/s | 790 | – |  |"),
        (None, 1000.0, "| tokens/s | – | 1,000 |  |"),
        (5.0, 0.02, "| tokens/s | 5 | 0 |  |"),
    ],
)
def test_a_difference_of_more_than_a_fifth_is_marked(
    measured: float | None, planned: float | None, row: str
) -> None:
    assert Compared("tokens/s", measured, planned).row == row
