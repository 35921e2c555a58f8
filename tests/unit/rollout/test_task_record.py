"""The record of an evaluation with tasks: its intervals, and what it rejects."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from tests.fakes.task_records import record, result
from vpmoe.rollout.task_record import TaskEvaluation, TaskResult, wilson

SEED = int(np.random.default_rng().integers(2**32))


def test_the_interval_has_the_shares_that_a_test_does_not_reject() -> None:
    """The bounds p are where |share − p| is 1.96 standard errors of p; found by bisection, to 1e-9."""
    print(f"seed {SEED}")
    random = np.random.default_rng(SEED)
    quantile = 1.959963984540054

    def rejected(p: float, share: float, questions: int) -> bool:
        return abs(share - p) > quantile * math.sqrt(p * (1 - p) / questions)

    def bound(inside: float, outside: float, share: float, questions: int) -> float:
        for _ in range(100):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejected(middle, share, questions) else (middle, outside)
        return inside

    for _ in range(50):
        questions = int(random.integers(1, 2000))
        right = int(random.integers(0, questions + 1))
        share = right / questions
        # At 0 and 1 the bound on that side is the share itself.
        expected = bound(share, 0.0, share, questions), bound(share, 1.0, share, questions)
        assert wilson(right, questions) == pytest.approx(expected, abs=1e-9)


def test_a_record_is_read_as_it_was_written() -> None:
    written = record("onpolicy")
    read = TaskEvaluation.model_validate(written.dump())
    assert read == written
    first = written.dump()["results"][0]
    assert first["accuracy"] == first["right"] / first["questions"]
    assert first["interval"][0] < first["accuracy"] < first["interval"][1]
    assert first["cutOff"] == first["validity"]["truncated"]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"right": 21}, id="more right than questions"),
        pytest.param({"validity": {"valid": 19}}, id="an answer without validity"),
        pytest.param({"validity": {"good": 20}}, id="unknown validity"),
    ],
)
def test_counts_that_do_not_fit_are_rejected(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TaskResult.model_validate({**result("student", "low", 3).dump(), **change})
