"""A worker of a step that is split into parts: which parts it makes, when it must stop, and how it reports
progress.

Workers never wait for each other and none is a leader, so each reports the progress of the whole step.
"""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypedDict

from vpmoe.api import DistillRun
from vpmoe.api.progress import Amount, DatasetStatus, Progress
from vpmoe.clock import now
from vpmoe.failure import Retriable, Terminated
from vpmoe.process.board import ProgressBoard
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket, paths
from vpmoe.storage.records import load_record


@dataclass(frozen=True)
class StepWorker:
    """One worker of one attempt at a step."""

    run: DistillRun
    bucket: Bucket
    provenance: Provenance
    stopping: threading.Event
    """Set when the process is asked to stop."""
    board: ProgressBoard
    """Where the progress is published."""
    worker: int | None
    """Index among the pods of an Indexed Job; None if this process makes all parts."""

    def share(self, parts: int, workers: int) -> range:
        """The parts that this worker makes if `workers` share them."""
        return range(parts) if self.worker is None else range(self.worker, parts, workers)

    def check_stop(self) -> None:
        """Raise Terminated if the process was asked to stop.

        There is nothing to save: done parts are in the bucket.
        """
        if self.stopping.is_set():
            step = self.provenance.step
            raise Terminated(
                f"{step} was asked to stop; the parts that are done are in the bucket, the next attempt "
                "makes the rest."
            )

    def pause(self, seconds: float) -> None:
        """Sleep for `seconds`. Raises Terminated as soon as the process is asked to stop."""
        self.stopping.wait(seconds)
        self.check_stop()

    def report(self, message: str, done: int, parts: int, speed: float | None = None) -> None:
        """Report progress: the parts that all workers have done, and this worker's tokens per second."""
        self.publish_progress(message, parts=Amount(done=done, total=parts), tokens_per_second=speed)

    def report_success(
        self, message: str, parts: int, dataset: DatasetStatus | None = None, *, reused: bool = False
    ) -> None:
        """Report that the step is complete. This must be the last report of the step.

        `reused`: its outputs were in the bucket already.

        A worker that finds parts missing reports that first and looks for the manifest afterwards. If another
        worker completed the step in between, this worker then sees the manifest and reports success again.
        """
        done = Amount(done=parts, total=parts)
        self.publish_progress(message, "Succeeded", parts=done, dataset=dataset, reused=reused)

    def publish_progress(
        self,
        message: str,
        state: Literal["Running", "Succeeded"] = "Running",
        *,
        parts: Amount | None = None,
        tokens_per_second: float | None = None,
        validity: float | None = None,
        model: str | None = None,
        dataset: DatasetStatus | None = None,
        reused: bool = False,
    ) -> None:
        """Publish the step's progress on the board, then overwrite its progress.json."""
        progress = Progress(
            run=self.provenance.run,
            step=self.provenance.step,
            attempt=self.provenance.attempt,
            state=state,
            message=message,
            reused=reused or None,
            updated=now(),
            parts=parts,
            tokens_per_second=tokens_per_second,
            validity=validity,
            model=model,
            dataset=dataset,
        )
        self.board.progress = progress
        key = paths.progress(self.run, self.provenance.step)
        self.bucket.write_json(key, progress.dump(), self.provenance.metadata())


class StepState(TypedDict):
    """What other steps read of a progress.json, of any version."""

    state: str


def step_succeeded(run: DistillRun, bucket: Bucket, step: str) -> bool:
    """Whether a step of the run has reported success."""
    key = paths.progress(run, step)
    return bucket.exists(key) and load_record(bucket, key, StepState)["state"] == "Succeeded"


@contextmanager
def scratch_disk(step: str, needs: str) -> Iterator[None]:
    """Turn an OSError of the scratch disk into a Retriable error that says how to get more space.

    `needs` is the space that one part takes. The bucket refers to nothing of the unfinished part.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise Retriable(
            f"{tempfile.gettempdir()}: {error.strerror}. A part needs {needs} on disk. Point TMPDIR to a "
            f"larger disk, or raise the ephemeral storage in runtime.resources.{step}."
        ) from error
