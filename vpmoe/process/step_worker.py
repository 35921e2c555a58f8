"""One worker of a step that is made in parts: which parts are its own, when it has to stop, and what the step says of itself.

Workers never wait for one another and none of them leads, so each reports for all. What a part is, is the step's own business.
"""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vpmoe.api import DistillRun
from vpmoe.api.progress import Amount, DatasetStatus, Progress
from vpmoe.clock import now
from vpmoe.failure import Retriable, Terminated
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket, paths


@dataclass(frozen=True)
class Worker:
    """One worker's view of a step. `worker` is its index among the pods of an Indexed Job, None where it makes all parts."""

    run: DistillRun
    bucket: Bucket
    provenance: Provenance
    stopping: threading.Event
    worker: int | None

    def share(self, parts: int, workers: int) -> range:
        """The parts that are this worker's to make, of `workers`."""
        return range(parts) if self.worker is None else range(self.worker, parts, workers)

    def check_stop(self) -> None:
        """Raise Terminated once the process was asked to stop. There is nothing to save: parts that are done are in the bucket."""
        if self.stopping.is_set():
            step = self.provenance.step
            raise Terminated(
                f"{step} was asked to stop; the parts that are done are in the bucket, the next attempt makes the others."
            )

    def pause(self, seconds: float) -> None:
        """Wait so long; raise Terminated as soon as the process is asked to stop."""
        self.stopping.wait(seconds)
        self.check_stop()

    def report(self, message: str, done: int, parts: int, speed: float | None = None) -> None:
        """Say how far the step is: all workers' parts, this worker's tokens a second."""
        self._write("Running", message, done, parts, speed, None)

    def report_success(self, message: str, parts: int, dataset: DatasetStatus | None = None) -> None:
        """Say that everything is there. Whoever ends last must leave this word: a worker that finds parts missing reports that first
        and looks for the manifest afterwards, so its report cannot come after the success of another without its noticing.
        """
        self._write("Succeeded", message, parts, parts, None, dataset)

    def _write(
        self,
        state: str,
        message: str,
        done: int,
        parts: int,
        speed: float | None,
        dataset: DatasetStatus | None,
    ) -> None:
        said = Progress.model_validate(
            {
                "step": self.provenance.step,
                "attempt": self.provenance.attempt,
                "state": state,
                "message": message,
                "updated": now(),
                "parts": Amount(done=done, total=parts),
                "tokens_per_second": speed,
                "dataset": dataset,
            }
        )
        self.bucket.write_json(
            paths.progress(self.run, self.provenance.step), said.dump(), self.provenance.metadata()
        )


def succeeded(run: DistillRun, bucket: Bucket, step: str) -> bool:
    """Whether a step of the run has reported that it is finished."""
    key = paths.progress(run, step)
    return bucket.exists(key) and bucket.get_json(key)["state"] == "Succeeded"


@contextmanager
def scratch_disk(step: str, needs: str) -> Iterator[None]:
    """Say what to do when the scratch disk is full. `needs` is what a part takes. Nothing of the part is in the bucket then that
    anything refers to.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise Retriable(
            f"{tempfile.gettempdir()}: {error.strerror}. A part needs {needs} on disk; point TMPDIR to more space, or raise "
            f"runtime.resources.{step}' ephemeral storage."
        ) from error
