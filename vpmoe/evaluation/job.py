"""One attempt at the evaluation step: its progress, its timings, and the parts that earlier attempts have
measured.

A part is a few fields of the EvaluationRecord. It is written to the bucket as soon as it is measured, under a
name that contains the checkpoint's sha256. The first writer wins, and a new attempt continues with the first
part that is missing.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vpmoe.api import Stage
from vpmoe.api.progress import Amount
from vpmoe.data.dataset import dataset_facts
from vpmoe.process.step_worker import StepWorker
from vpmoe.storage import paths
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.manifest import Manifest
from vpmoe.storage.records import load_record

REPORT_SECONDS = 10.0
"""Seconds between two reports within a part."""


@dataclass(frozen=True)
class EvaluationWorker(StepWorker):
    """One attempt at evaluating a stage."""

    stage: Stage
    dataset: Manifest
    parts: int
    """Number of parts that are to be measured."""
    measured: list[str] = field(default_factory=list)
    """Names of the parts that are in the bucket."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Duration of each thing that this attempt did, by name."""

    def report_running(self, message: str, validity: float | None = None) -> None:
        """Report what the step is doing, and how many parts are measured. `validity`: share of valid
        completions in the latest measurement, if there is one."""
        self.publish_progress(
            message,
            parts=self._amount(),
            validity=validity,
            dataset=dataset_facts(self.bucket, self.dataset),
        )

    def report_measured(self, message: str, validity: float | None, *, reused: bool = False) -> None:
        """Report success. `validity`: share of valid completions, None if none was sampled. `reused`: an
        earlier attempt has measured all of it."""
        self.publish_progress(
            message,
            "Succeeded",
            parts=self._amount()
            if self.measured
            else None,  # none if an earlier attempt measured all of them
            validity=validity,
            dataset=dataset_facts(self.bucket, self.dataset),
            reused=reused,
        )

    def _amount(self) -> Amount:
        return Amount(done=len(self.measured), total=max(self.parts, len(self.measured)))

    @contextmanager
    def timed(self, name: str, message: str = "") -> Iterator[None]:
        """Record the block's duration under `name`; report `message` first, if given.

        Raises Terminated before the block if the process was asked to stop.
        """
        self.check_stop()
        if message:
            self.report_running(message)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 3)

    def batches[T](self, items: Sequence[T], size: int, message: str) -> Iterator[Sequence[T]]:
        """Batches of up to `size` items; between them report `message` and how many items are done."""
        reported = 0.0
        for start in range(0, len(items), size):
            self.check_stop()
            if time.monotonic() - reported > REPORT_SECONDS or not start:
                reported = time.monotonic()
                self.report_running(f"{message}, {start} of {len(items)}")
            yield items[start : start + size]

    def measure_part(
        self, name: str, checkpoint: Manifest, measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The fields of a part: from the bucket if an attempt measured this checkpoint, otherwise measured
        now."""
        key = paths.evaluation_part(self.run, self.stage.name, name, checkpoint.sha256)
        if not self.bucket.exists(key):
            self.bucket.create(key, json_bytes(measure()), self.provenance.metadata())
        self.measured.append(name)
        return load_record(self.bucket, key, dict[str, Any])
