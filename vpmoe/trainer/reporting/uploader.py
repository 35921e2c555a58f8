"""Publishes the progress of a stage, and writes what rank 0 reports to the bucket, from a thread:
progress.json, and lines of metrics as small objects.

The line of a step is in the bucket before the next checkpoint exists, and a resumed attempt writes no second
line for a step that has one. So over all objects each step of the stage has exactly one line, whatever was
killed. Their names: <sequence>-a<attempt>-<first step>-<last step>.jsonl.
"""

import json
import logging
import re
import threading
from collections.abc import Callable
from typing import Any

from vpmoe.api.progress import Progress
from vpmoe.clock import now
from vpmoe.storage import StorageError, paths
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.reporting.lines import TrainerLine

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 2.0
METRICS_SECONDS = 30.0
NAME = re.compile(r"(\d+)-a\d+-\d+-(\d+)")


class ProgressUploader:
    """Progress and metrics of one attempt. `update` and `log` do not wait for the store; `check` raises what
    it refused for good. The board has each progress at once, whatever the store does."""

    def __init__(self, context: StageContext, progress: Progress) -> None:
        self._context = context
        self._progress = context.board.progress = progress
        self._written: Progress | None = None
        self._lines: list[TrainerLine] = []
        self._fault: StorageError | None = None
        self._changing = threading.Lock()
        """Held while the progress or the lines change."""
        self._uploading = threading.Lock()
        self._sequence, self._logged = self._earlier_attempts()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="progress", daemon=True)
        self._thread.start()

    def update(self, **changes: Any) -> None:
        """Change fields of the progress. `updated` becomes now; while the loop hangs it does not change,
        which shows the hang."""
        with self._changing:
            self._progress = self._progress.model_copy(update={**changes, "updated": now()})
            self._context.board.progress = self._progress

    def log(self, *lines: TrainerLine) -> None:
        """Add all lines of one step, which stay together, unless an earlier attempt has written that
        step's."""
        with self._changing:
            self._lines += [line for line in lines if line.event == "start" or line.step > self._logged]

    def flush_metrics(self) -> None:
        """Write the lines so far as one object. Raises StorageError if they cannot be written; then they
        are kept."""
        with self._uploading:
            with self._changing:
                lines = list(self._lines)
            if not lines:
                return
            steps = [line.step for line in lines]
            name = f"{self._sequence:06d}-a{self._context.provenance.attempt}-{min(steps)}-{max(steps)}"
            text = "".join(
                json.dumps(line.dump(), ensure_ascii=False, allow_nan=False) + "\n" for line in lines
            )
            key = paths.metrics(self._context.run, self._context.stage.name, name)
            self._context.bucket.put_bytes(key, text.encode(), self._context.provenance.metadata())
            self._sequence += 1
            with self._changing:
                del self._lines[: len(lines)]

    def check(self) -> None:
        """Raise what the store refused for good."""
        if self._fault:
            raise self._fault

    def finish(self, **changes: Any) -> None:
        """Change the progress for the last time and write it with all lines. Raises StorageError if that
        fails."""
        self.update(**changes)
        self._stop()
        self.flush_metrics()
        self._write_progress()

    def close(self) -> None:
        """End the thread after an error, and write what can still be written. Does nothing after `finish`."""
        if self._thread.is_alive():
            self._stop()
            self._try(self.flush_metrics)
            self._try(self._write_progress)

    def _earlier_attempts(self) -> tuple[int, int]:
        """(sequence of the next object, last step that has a line) from the names of what earlier attempts
        wrote."""
        folder = paths.metrics(self._context.run, self._context.stage.name, "").removesuffix(".jsonl")
        found = [match for entry in self._context.bucket.list(folder) if (match := NAME.search(entry.key))]
        return max((int(match[1]) + 1 for match in found), default=0), max(
            (int(match[2]) for match in found), default=-1
        )

    def _keep_writing(self) -> None:
        waited = 0.0
        while not self._end.wait(PROGRESS_SECONDS):
            self._try(self._write_progress)
            waited += PROGRESS_SECONDS
            if waited >= METRICS_SECONDS:
                self._try(self.flush_metrics)
                waited = 0.0

    def _write_progress(self) -> None:
        with self._uploading:
            with self._changing:
                progress = self._progress
            if progress is not self._written:
                key = paths.progress(self._context.run, self._context.stage.name)
                self._context.bucket.write_json(key, progress.dump(), self._context.provenance.metadata())
                self._written = progress

    def _try(self, write: Callable[[], None]) -> None:
        """Training continues while the store does not answer: what could not be written is kept and written
        the next time."""
        try:
            write()
        except StorageError as error:
            log.warning("Progress or metrics could not be written and are kept for the next time: %s", error)
            if not error.retriable:
                self._fault = error

    def _stop(self) -> None:
        self._end.set()
        self._thread.join()
