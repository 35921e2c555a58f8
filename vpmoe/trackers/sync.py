"""Writes what is new in a run's metrics into a tracker, once or until the run has finished.

Nothing is kept about what was written: each tracker looks at what it has. So a sync that was interrupted, or
is started again, continues without writing a point twice. Two at the same time into one place would.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol

from vpmoe.trackers.reader import MetricsReader, TrackedStep
from vpmoe.trackers.rows import Row

POLL_SECONDS = 30.0
"""The trainer writes its metrics as often."""


class TrackerRun(Protocol):
    """A step of the run in a tracker, created by the first call or continued."""

    def write(self, rows: Sequence[Row], ended: bool) -> int:
        """Write those rows that the tracker does not have, and return their number. `ended`: no rows of this
        step will follow."""

    def close(self) -> None:
        """Finish writing. The run may be continued later."""


class Tracker(Protocol):
    """A place that runs are tracked in."""

    def open(self, step: TrackedStep) -> TrackerRun:
        """The step's run. Raises Permanent if the tracker rejects it."""


def sync(
    reader: MetricsReader,
    tracker: Tracker,
    say: Callable[[str], None],
    *,
    follow: bool = False,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    """Write all rows that the tracker does not have; returns their number.

    `follow`: go on every POLL_SECONDS until the run has finished. `pause`: sleeps. Raises StorageError,
    Permanent if an object is malformed.
    """
    total = 0
    with ExitStack() as stack:
        open_runs: dict[str, TrackerRun] = {}
        while True:
            # Before the reading, so that a run that has finished is read once more.
            finished = not follow or reader.finished()
            for new in reader.read():
                name = new.step.name
                if name not in open_runs:
                    open_runs[name] = tracker.open(new.step)
                    stack.callback(open_runs[name].close)
                if written := open_runs[name].write(new.rows, new.ended):
                    say(f"{name}: {written} rows")
                total += written
            if finished:
                return total
            pause(POLL_SECONDS)
