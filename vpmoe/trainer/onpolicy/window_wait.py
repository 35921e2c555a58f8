"""Waiting for a window: rank 0 looks into the bucket, all ranks hear what it sees and whether anybody wants to stop.

So all ranks go on with the same window, or stop after the same step. How long was waited for whom is measured here; what follows from it
is pressure.py's business.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Literal, NamedTuple

from vpmoe.model import distributed
from vpmoe.storage import Bucket, paths
from vpmoe.trainer.context import ObjectGroup, StageContext

POLL = 1.0
"""Seconds between two looks."""
PATIENCE = timedelta(hours=1)
"""How much longer one rank may take to look than another."""

Kind = Literal["rollouts", "scores"]


class Waits(NamedTuple):
    """Seconds for which a window was waited for; the scores' begin when its rollouts are there."""

    rollouts: float
    scores: float


class Waiting:
    """Waits for a stage's windows. Every rank makes one."""

    def __init__(self, task: StageContext) -> None:
        self._task = task
        self._talk = ObjectGroup(PATIENCE)

    def wait(self, window: int, meanwhile: Callable[[Kind], None]) -> Waits | None:
        """Return once a window's rollouts and scores are in the bucket; None where any rank was asked to stop. Every rank calls it.

        `meanwhile` hears about once a second what is missing.
        """
        waited: dict[Kind, float] = {"rollouts": 0.0, "scores": 0.0}
        missing: Kind | None = "rollouts"
        looked = time.monotonic()
        while True:
            if distributed.rank() == 0:
                missing = self._missing(window, missing)
            words = self._talk.gather((missing, self._task.stopping.is_set()))
            missing = words[0][0]
            if any(stops for _, stops in words):
                return None
            if missing is None:
                return Waits(**waited)
            meanwhile(missing)
            self._task.stopping.wait(POLL)
            waited[missing] += (now := time.monotonic()) - looked
            looked = now

    def _missing(self, window: int, before: Kind | None) -> Kind | None:
        """What is not there yet; `before` is what was not when we last looked."""
        run, stage, bucket = self._task.run, self._task.stage.name, self._task.bucket
        if before == "rollouts" and not bucket.exists(paths.window(run, stage, window, "rollouts")):
            return "rollouts"
        return None if bucket.exists(paths.window(run, stage, window, "scores")) else "scores"


def buffer(task: StageContext, window: int, most: int) -> dict[str, int]:
    """How many windows from `window` on are sampled, and scored, in a row: at most `most` of them."""

    def ready(bucket: Bucket, kind: Kind) -> int:
        found = (
            number
            for number in range(most)
            if not bucket.exists(paths.window(task.run, task.stage.name, window + number, kind))
        )
        return next(found, most)

    return {"sampled": ready(task.bucket, "rollouts"), "scored": ready(task.bucket, "scores")}
