"""What rank 0 says about a stage: progress.json for the operator, and lines of metrics as small objects, both from a thread.

The line of a step before a checkpoint is in the bucket before that checkpoint exists, and a resumed attempt writes no second line for a
step that has one: so all lines of a stage together have each step once, whatever was killed when. Names of the objects:
<sequence>-a<attempt>-<first step>-<last step>.jsonl.
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

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 2.0
METRICS_SECONDS = 30.0
NAME = re.compile(r"(\d+)-a\d+-\d+-(\d+)")


class ProgressUploader:
    """Progress and metrics of one attempt. The loop's calls cost nothing; `check` tells it of what the store refused for good."""

    def __init__(self, task: StageContext, progress: Progress) -> None:
        self._task = task
        self._progress = progress
        self._written: Progress | None = None
        self._lines: list[dict[str, Any]] = []
        self._fault: StorageError | None = None
        self._words = threading.Lock()
        self._uploads = threading.Lock()
        self._sequence, self._logged = self._before()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="report", daemon=True)
        self._thread.start()

    def update(self, **changes: Any) -> None:
        """Change fields of the progress. `updated` is now: it stands still when the loop does, which is how a hang is seen."""
        with self._words:
            self._progress = self._progress.model_copy(update={**changes, "updated": now()})

    def log(self, *lines: dict[str, Any]) -> None:
        """Add all lines of one step, which stay together, unless an earlier attempt has written that step's."""
        with self._words:
            self._lines += [line for line in lines if line["event"] == "start" or line["step"] > self._logged]

    def flush_metrics(self) -> None:
        """Write the lines so far as one object. Raises StorageError where they cannot be written; they are kept then."""
        with self._uploads:
            with self._words:
                lines = list(self._lines)
            if not lines:
                return
            steps = [line["step"] for line in lines]
            name = f"{self._sequence:06d}-a{self._task.provenance.attempt}-{min(steps)}-{max(steps)}"
            text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
            key = paths.metrics(self._task.run, self._task.stage.name, name)
            self._task.bucket.put_bytes(key, text.encode(), self._task.provenance.metadata())
            self._sequence += 1
            with self._words:
                del self._lines[: len(lines)]

    def check(self) -> None:
        """Raise what the store refused for good."""
        if self._fault:
            raise self._fault

    def finish(self, **changes: Any) -> None:
        """Write the last words and all lines. Raises StorageError where that fails."""
        self.update(**changes)
        self._stop()
        self.flush_metrics()
        self._write_progress()

    def close(self) -> None:
        """End the thread without last words, where another error ends the process; what can still be said is."""
        if self._thread.is_alive():
            self._stop()
            self._try(self.flush_metrics)
            self._try(self._write_progress)

    def _before(self) -> tuple[int, int]:
        """(sequence of the next object, last step that has a line) from the names of what earlier attempts wrote."""
        folder = paths.metrics(self._task.run, self._task.stage.name, "").removesuffix(".jsonl")
        found = [match for entry in self._task.bucket.list(folder) if (match := NAME.search(entry.key))]
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
        with self._uploads:
            with self._words:
                progress = self._progress
            if progress is not self._written:
                key = paths.progress(self._task.run, self._task.stage.name)
                self._task.bucket.write_json(key, progress.dump(), self._task.provenance.metadata())
                self._written = progress

    def _try(self, write: Callable[[], None]) -> None:
        """A store that is away for a while does not stop training: what was to be written stays, and is tried again."""
        try:
            write()
        except StorageError as error:
            log.warning("Not written, kept for the next time: %s", error)
            if not error.retriable:
                self._fault = error

    def _stop(self) -> None:
        self._end.set()
        self._thread.join()
