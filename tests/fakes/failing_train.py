"""jobs.train with a fault: rank 1 fails in the stage's second step, before a sum that the other ranks wait
for. The launcher's patience with these is shorter, so that a test is."""

import os
import sys
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from jobs import train
from vpmoe.process import launcher

FAULT = "the fault of tests/fakes/failing_train.py"
GRACE_SECONDS = 5.0


def launch() -> None:
    """As jobs.train, with ranks of this module."""
    launch_workers = launcher.launch_workers

    def launch_these(placement: launcher.Placement, command: Sequence[str], *others: Any) -> int:
        return launch_workers(
            placement, [sys.executable, "-m", "tests.fakes.failing_train", *command[3:]], *others
        )

    with (
        patch.object(launcher, "launch_workers", launch_these),
        patch.object(launcher, "GRACE_SECONDS", GRACE_SECONDS),
    ):
        train.main()


def work() -> None:
    """As one rank of jobs.train."""
    from vpmoe.model.learner import Learner  # as jobs.train, not in the launcher

    step = Learner.step

    def step_or_fail(learner: Learner, learning_rate: float) -> float:
        if os.environ["RANK"] == "1" and learner.steps == 1:
            raise RuntimeError(FAULT)
        return step(learner, learning_rate)

    with patch.object(Learner, "step", step_or_fail):
        train.main()


if __name__ == "__main__":
    work() if "LOCAL_RANK" in os.environ else launch()
