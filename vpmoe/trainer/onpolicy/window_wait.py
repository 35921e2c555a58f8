"""Waiting for a window: rank 0 looks into the bucket, and all ranks agree on what it saw and whether to stop.

So all ranks continue with the same window, or stop after the same step. The seconds of waiting are measured
here; what follows from them is decided in starvation.py.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Literal, NamedTuple

from vpmoe.api.base import Record
from vpmoe.api.metrics import Sample
from vpmoe.api.pod_metrics import WAIT_SECONDS
from vpmoe.model import distributed
from vpmoe.storage import paths
from vpmoe.trainer.context import ObjectGroup, StageContext

POLL = 1.0
"""Seconds between two looks."""
PATIENCE = timedelta(hours=1)
"""How much longer one rank may take to look than another."""

WindowFile = Literal["rollouts", "scores"]


class Waits(NamedTuple):
    """Seconds of waiting for a window. Waiting for scores begins when the rollouts are there."""

    rollouts: float
    scores: float


class WindowBuffer(Record):
    """Windows that are ready ahead of the trainer, in a row."""

    sampled: int
    scored: int


class WindowWait:
    """Waits for a stage's windows. Every rank has one."""

    def __init__(self, context: StageContext) -> None:
        self._context = context
        self._group = ObjectGroup(PATIENCE)

    def wait(self, window: int, waiting: Callable[[WindowFile], None]) -> Waits | None:
        """Return once a window's rollouts and scores are in the bucket. Every rank calls it.

        Returns None if any rank was asked to stop.

        `waiting` is called about once a second with what is missing.
        """
        waited: dict[WindowFile, float] = {"rollouts": 0.0, "scores": 0.0}
        missing: WindowFile | None = "rollouts"
        looked = time.monotonic()
        while True:
            if distributed.rank() == 0:
                missing = self._missing(window, missing)
            seen = self._group.gather((missing, self._context.stopping.is_set()))
            missing = seen[0][0]
            if any(stopping for _, stopping in seen):
                return None
            if missing is None:
                return Waits(**waited)
            waiting(missing)
            self._context.stopping.wait(POLL)
            seconds = (now := time.monotonic()) - looked
            waited[missing] += seconds
            self._context.board.metrics.record([Sample(WAIT_SECONDS, seconds, {"reason": missing})])
            looked = now

    def buffer(self, window: int, most: int) -> WindowBuffer:
        """How many windows from `window` on are ready, at most `most`."""
        return WindowBuffer(
            sampled=self._ready(window, "rollouts", most), scored=self._ready(window, "scores", most)
        )

    def _ready(self, window: int, file: WindowFile, most: int) -> int:
        return next((count for count in range(most) if not self._exists(window + count, file)), most)

    def _missing(self, window: int, before: WindowFile | None) -> WindowFile | None:
        """What is missing; `before` is what was missing at the latest look."""
        if before == "rollouts" and not self._exists(window, "rollouts"):
            return "rollouts"
        return None if self._exists(window, "scores") else "scores"

    def _exists(self, window: int, file: WindowFile) -> bool:
        key = paths.window(self._context.run, self._context.stage.name, window, file)
        return self._context.bucket.exists(key)
