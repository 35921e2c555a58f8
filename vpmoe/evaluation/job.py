"""One attempt at the evaluation step: what it says of itself, and the parts that it need not do again.

A part is a few fields of the Evaluation. Each is kept in the bucket as soon as it is measured, under a name that says of which checkpoint,
and whoever measures it first is right; so an attempt goes on at the first part that is missing.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vpmoe.api import DistillRun, Stage
from vpmoe.api.progress import Amount, DatasetStatus, Progress
from vpmoe.clock import now
from vpmoe.failure import Terminated
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket, paths
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.manifest import Manifest

REPORT_SECONDS = 10.0
"""Seconds between reports while the student is asked."""


@dataclass
class Job:
    """One attempt."""

    run: DistillRun
    stage: Stage
    bucket: Bucket
    provenance: Provenance
    stopping: threading.Event
    dataset: Manifest
    parts: int = 0
    """Parts that there are to do."""
    done: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """What this attempt took for each thing that it did."""
    _reported: float = 0.0

    def check_stop(self) -> None:
        """Raise Terminated once the process was asked to stop."""
        if self.stopping.is_set():
            raise Terminated(
                f"{self.provenance.step} was asked to stop; the parts that are measured are in the bucket."
            )

    def say(self, message: str, state: str = "Running", validity: float | None = None) -> None:
        """Write the step's progress."""
        self._reported = time.monotonic()
        made = self.dataset
        said = Progress.model_validate(
            {
                "step": self.provenance.step,
                "attempt": self.provenance.attempt,
                "state": state,
                "message": message,
                "updated": now(),
                "parts": Amount(done=self.done, total=self.parts) if self.parts else None,
                "validity": validity,
                "dataset": DatasetStatus(
                    id=made.facts["id"], manifest=self.bucket.url(made.key), sha256=made.sha256
                ),
            }
        )
        self.bucket.write_json(
            paths.progress(self.run, self.provenance.step), said.dump(), self.provenance.metadata()
        )

    @contextmanager
    def timed(self, name: str, message: str = "") -> Iterator[None]:
        """Say what begins, if anything, unless the process is to stop; and keep the seconds that it takes under `name`."""
        self.check_stop()
        if message:
            self.say(message)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 3)

    def batches[T](self, items: Sequence[T], each: int, message: str) -> Iterator[Sequence[T]]:
        """The items by so many, with a report from time to time of how many are behind."""
        for start in range(0, len(items), each):
            self.check_stop()
            if time.monotonic() - self._reported > REPORT_SECONDS or not start:
                self.say(f"{message}, {start} of {len(items)}")
            yield items[start : start + each]

    def part(self, name: str, checkpoint: Manifest, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The fields that a part consists of: those that were measured of this checkpoint before, or else now."""
        key = paths.evaluation_part(self.run, self.stage.name, name, checkpoint.sha256)
        if not self.bucket.exists(key):
            self.bucket.create(key, json_bytes(measure()), self.provenance.metadata())
        self.done += 1
        found: dict[str, Any] = self.bucket.get_json(key)
        return found
