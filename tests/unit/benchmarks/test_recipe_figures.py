"""Figures of a short recipe, by hand: what counts of a trainer's and a worker's lines, and the table."""

from typing import Any

import pytest

from benchmarks.recipe_figures import Compared, TrainerFigures, WorkerFigures, later_share


def line(event: str, at: int, seconds: float, **more: Any) -> dict[str, Any]:
    """A line that was written `at` seconds after a minute's begin."""
    return {"event": event, "time": f"2026-01-01T00:00:{at:02d}Z", "seconds": seconds, **more}


def test_the_first_step_of_an_attempt_and_evaluations_do_not_count() -> None:
    """Two attempts; the later steps of the first take 10 s with 2 s between them and 3 s of an evaluation,
    that of the second 4 s."""
    lines = [
        line("step", 10, 9.0, tokens=1000, waitRollouts=8.0),
        line("evaluation", 13, 3.0),
        line("step", 20, 5.0, tokens=1600, waitRollouts=1.0, waitScores=1.0),
        line("step", 25, 5.0, tokens=2000, waitRollouts=0.0),
        line("started", 30, 0.0),
        line("step", 40, 9.0, tokens=2500, waitRollouts=6.0),
        line("step", 44, 4.0, tokens=2800, waitRollouts=3.0),
    ]
    found = TrainerFigures.of(lines)
    assert found.steady == pytest.approx((600 + 400 + 300) / (7 + 5 + 4))
    assert found.busy == pytest.approx(1 - (2 + 0 + 3) / 16)
    assert found.pauses == pytest.approx([2.0, 0.0, 0.0])
    assert found.waits == {"rollouts": 18.0, "scores": 1.0}
    alone = TrainerFigures.of(lines[:1])
    assert (alone.steady, alone.busy, alone.working) == (None, None, None)


def test_a_worker_is_busy_for_the_work_after_its_first_batch() -> None:
    """Windows of one version have the batch's seconds each."""
    batch: dict[str, Any] = {"attempt": 1, "tokensPerSecond": 10.0, "waitWeights": 0.5}
    lines = [
        line("window", at, seconds, version=version, **batch)
        for at, seconds, version in ((5, 5.0, 0), (6, 5.0, 0), (16, 4.0, 2), (26, 4.0, 4))
    ]
    found = WorkerFigures.of_sampler(lines)
    assert found.busy == pytest.approx(8 / 20)
    assert (found.windows, found.seconds, found.tokens) == (4, 13.0, 130.0)
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
