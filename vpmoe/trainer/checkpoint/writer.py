"""Checkpoint writer: training goes on while a copy of its state is uploaded.

`save` begins a copy to host memory (state_copy.py) and returns. A thread waits for the copy and uploads it
from there, without a disk. Its collectives are on a process group of its own, so they never meet training's.
One checkpoint is written at a time.

checkpoints/<stage>/<iteration>/ holds
  rank-00003.safetensors … one file a rank: the rank's named ranges of the fp32 state (vpmoe/model/state.py; a
                           tensor's key is `name[start:stop]`) and its random state;
  buffers.safetensors      of rank 0;
  manifest.json            last, with the TrainState and the student's parts among its facts.
Without its manifest a checkpoint does not exist, so a kill at any moment loses at most the steps since the
checkpoint before. reader.py loads checkpoints.
"""

import logging
from collections.abc import Callable, Iterable
from datetime import timedelta
from time import monotonic, time
from typing import Any, Protocol

from vpmoe.api.metrics import Sample
from vpmoe.api.pod_metrics import CHECKPOINT_TIME, CHECKPOINT_UPLOAD_SECONDS
from vpmoe.api.progress import CheckpointStatus
from vpmoe.checkpoint.format import PARTS_FACT
from vpmoe.checkpoint.train_state import TrainState, checkpoint_facts, iteration_of, list_iterations
from vpmoe.model import distributed
from vpmoe.model.learner import Learner
from vpmoe.storage import Bucket, StorageError, Stored, manifest, paths
from vpmoe.storage.manifest import Input
from vpmoe.trainer.background_upload import BackgroundUpload
from vpmoe.trainer.checkpoint.state_copy import FileCopy, StateCopy
from vpmoe.trainer.context import ObjectGroup, StageContext

log = logging.getLogger(__name__)

PATIENCE = timedelta(hours=1)
"""How much longer one rank's upload may take than another's."""


class CheckpointReport(Protocol):
    """Receives rank 0's report of a checkpoint: ProgressUploader."""

    def flush_metrics(self) -> None:
        """Write the lines of metrics so far. Called before the manifest: a step that is not repeated must
        have its line."""

    def update(self, *, checkpoint: CheckpointStatus) -> None:
        """Report the checkpoint as the latest. Called after the manifest."""


class CheckpointWriter:
    """Writes a stage's checkpoints, one at a time: a save waits for the one before."""

    def __init__(
        self,
        context: StageContext,
        learner: Learner,
        inputs: list[Input],
        rejected: Iterable[int],
        report: CheckpointReport | None,
    ) -> None:
        """Allocates the memory of a copy of the learner's state. `inputs`: what the stage's weights are made
        from, for the manifests. `rejected`: iterations of the stage's checkpoints that this attempt has
        rejected. Every rank has a writer; `report` is rank 0's alone."""
        self._learner = learner
        self._copy = StateCopy(learner)
        self._context = context
        self._inputs = inputs
        self._rejected = frozenset(rejected)
        self._report = report
        self._group = ObjectGroup(PATIENCE)
        self._upload = BackgroundUpload("checkpoint")
        self.saved: int | None = None
        """Iteration of the latest save."""
        self._saved_at = monotonic()

    @property
    def age(self) -> float:
        """Seconds since the latest save, or since the attempt began."""
        return monotonic() - self._saved_at

    @property
    def writing(self) -> bool:
        """Whether this rank has a checkpoint that is being written."""
        return self._upload.running

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written. Every rank then has an error for `wait` to raise, at the
        latest when it returns."""
        return self._upload.failed

    def save(self, at: TrainState) -> None:
        """Begin to copy this rank's state, and to write it once it is copied. Every rank calls it after the
        same step, and `hold_changes` before the next one changes the state."""
        self.wait()
        self._copy.take(self._learner)
        self.saved, self._saved_at = at.iteration, monotonic()
        self._upload.start(self._write, at, self._learner.student.shape.parts)

    def hold_changes(self) -> None:
        """Keep the device from changing the state before it is copied; the host does not wait."""
        self._copy.hold_changes()

    def wait(self) -> None:
        """Return once the checkpoint that is being uploaded, if any, exists. Raises on every rank what
        prevented it."""
        self._upload.wait()

    def check(self) -> None:
        """Raise the error of an upload that has failed; does not wait."""
        self._upload.check()

    def close(self) -> None:
        """End the thread, after the upload that may still be running, and free the copy's memory."""
        self._upload.close()
        self._copy.close()

    def _write(self, at: TrainState, parts: dict[str, Any]) -> None:
        self._copy.wait()
        bucket, run = self._context.bucket, self._context.run
        key = paths.checkpoint(run, at.stage, at.iteration)
        # a killed attempt may have left files there, or the checkpoint there was rejected
        self._agree(_fault(lambda: bucket.delete_prefix(key)) if self._report else None)
        stored: list[Stored] = []
        fault = _fault(
            lambda: stored.extend(self._put(f"{key}/{name}", file) for name, file in self._copy.files.items())
        )
        stored_by_rank = self._group.gather(stored)
        self._agree(fault)
        self._agree(_fault(lambda: self._complete(at, key, stored_by_rank, parts)) if self._report else None)

    def _complete(
        self, at: TrainState, key: str, stored_by_rank: list[list[Stored]], parts: dict[str, Any]
    ) -> None:
        """Write the manifest, which makes it a checkpoint. Rank 0 calls it."""
        assert self._report is not None
        bucket, run = self._context.bucket, self._context.run
        self._report.flush_metrics()
        self._delete_replaced(at)
        subjects = [one.subject(key) for of_rank in stored_by_rank for one in of_rank]
        facts: dict[str, Any] = {"ranks": distributed.world_size(), "position": at.dump()}
        if parts:
            facts[PARTS_FACT] = parts
        statement = manifest.statement("checkpoint", subjects, facts, self._context.provenance, self._inputs)
        written = manifest.write(bucket, paths.manifest(key), statement)
        self._report.update(checkpoint=checkpoint_facts(bucket, written, at))
        uploaded = Sample(CHECKPOINT_UPLOAD_SECONDS, self.age)
        self._context.board.metrics.record([uploaded, Sample(CHECKPOINT_TIME, time())])
        log.info(
            "Wrote checkpoint %s: %d files, %.1f MB",
            bucket.url(key),
            len(subjects),
            sum(one.size for one in subjects) / 1e6,
        )
        prune(bucket, paths.checkpoints(run, at.stage), run.spec.training.checkpoint.keep, at.iteration)

    def _delete_replaced(self, at: TrainState) -> None:
        """Delete the rejected checkpoints that the one at `at` replaces.

        Rank 0 calls it before the manifest is written, so a kill leaves no rejected one that is older than a
        usable one. The next attempt would not read it, and would count it as kept.
        """
        bucket, run = self._context.bucket, self._context.run
        gone = replaced(self._rejected, at)
        for iteration in sorted(gone - {at.iteration}):  # that folder has this one's files by now
            key = paths.checkpoint(run, at.stage, iteration)
            bucket.delete_prefix(key)
            log.warning(
                "Deleted checkpoint %s, which this attempt has rejected: checkpoint %d replaces it",
                bucket.url(key),
                at.iteration,
            )
        self._rejected -= gone

    def _put(self, key: str, file: FileCopy) -> Stored:
        return self._context.bucket.put_parts(
            key, file.size, file.parts(), self._context.provenance.metadata()
        )

    def _agree(self, fault: StorageError | None) -> None:
        """Raise StorageError on every rank if any rank has a fault: a checkpoint is complete or does not
        exist."""
        told = (str(fault), fault.reason) if fault else None
        for rank, found in enumerate(self._group.gather(told)):
            if found:
                message, reason = found
                raise StorageError(
                    f"rank {rank} could not write its part of a checkpoint: {message}", reason
                ) from fault


def replaced(rejected: frozenset[int], at: TrainState) -> frozenset[int]:
    """Which of the rejected checkpoints the one at `at` replaces: those that are not newer, and all if the
    stage ends with it, because the newest checkpoint of a finished stage is its end."""
    return frozenset(iteration for iteration in rejected if iteration <= at.iteration or at.finished)


def prune(bucket: Bucket, folder: str, keep: int, latest: int) -> None:
    """Delete all but the `keep` newest checkpoints of a stage up to `latest`, and what killed attempts left
    before those. Newer ones were rejected when this attempt began: they count for nothing, and stay until a
    checkpoint replaces them. What no job writes there stays too."""
    kept = [iteration for iteration in list_iterations(bucket, folder) if iteration <= latest][:keep]
    names = {found.key.removeprefix(folder + "/").partition("/")[0] for found in bucket.list(folder + "/")}
    present = {iteration for name in names if (iteration := iteration_of(name)) is not None}
    for iteration in sorted(present - set(kept)):
        if iteration < latest:
            bucket.delete_prefix(f"{folder}/{iteration}")


def _fault(action: Callable[[], object]) -> StorageError | None:
    """The error of `action`, for the other ranks; None if it succeeded."""
    try:
        action()
    except StorageError as error:
        return error
    return None
