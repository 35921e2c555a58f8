"""Checkpoint writer: training waits while files are written to local disk, but not while they are uploaded.

checkpoints/<stage>/<iteration>/ holds
  rank-00003.safetensors … one file a rank: the rank's named ranges of the fp32 state (vpmoe/model/state.py; a
                           tensor's key is `name[start:stop]`) and its random state;
  buffers.safetensors      of rank 0;
  manifest.json            last, with the TrainState and the student's parts among its facts.
Without its manifest a checkpoint does not exist, so a kill at any moment loses at most the steps since the
checkpoint before. reader.py loads checkpoints.
"""

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from vpmoe.api.metrics import Sample
from vpmoe.api.pod_metrics import CHECKPOINT_TIME, CHECKPOINT_UPLOAD_SECONDS
from vpmoe.api.progress import CheckpointStatus
from vpmoe.checkpoint.format import PARTS_FACT
from vpmoe.checkpoint.train_state import TrainState, checkpoint_facts, iteration_of, list_iterations
from vpmoe.failure import Retriable
from vpmoe.model import distributed, state
from vpmoe.model.learner import Learner
from vpmoe.storage import Bucket, StorageError, Stored, manifest, paths
from vpmoe.storage.manifest import Input
from vpmoe.trainer.background_upload import BackgroundUpload
from vpmoe.trainer.context import ObjectGroup, StageContext

log = logging.getLogger(__name__)

BUFFERS = "buffers.safetensors"
PATIENCE = timedelta(hours=1)
"""How much longer one rank's upload may take than another's."""


class CheckpointReport(Protocol):
    """Receives rank 0's report of a checkpoint: ProgressUploader."""

    def flush_metrics(self) -> None:
        """Write the lines of metrics so far. Called before the manifest: a step that is not repeated must
        have its line."""

    def update(self, *, checkpoint: CheckpointStatus) -> None:
        """Report the checkpoint as the latest. Called after the manifest."""


def rank_file(rank: int) -> str:
    """Name of a rank's file in a checkpoint."""
    return f"rank-{rank:05d}.safetensors"


def checkpoint_files(learner: Learner) -> dict[str, dict[str, Tensor]]:
    """This rank's files of a checkpoint: by name the tensors in it, copied to the CPU."""
    files: dict[str, dict[str, Tensor]] = {}
    for held in state.slices(learner):
        file = BUFFERS if held.name.startswith("buffer/") else rank_file(distributed.rank())
        files.setdefault(file, {})[f"{held.name}[{held.start}:{held.stop}]"] = held.tensor.detach().to(
            "cpu", copy=True
        )
    rank = distributed.rank()
    random = {
        f"random/{rank}/{name}[0:{values.numel()}]": values for name, values in state.random_state().items()
    }
    files.setdefault(rank_file(rank), {}).update(random)
    return files


class CheckpointWriter:
    """Writes a stage's checkpoints, one at a time: a save waits for the upload of the one before."""

    def __init__(self, context: StageContext, inputs: list[Input], report: CheckpointReport | None) -> None:
        """`inputs`: what the stage's weights are made from, for the manifests. Every rank has a writer;
        `report` is rank 0's alone."""
        self._context = context
        self._inputs = inputs
        self._report = report
        self._group = ObjectGroup(PATIENCE)
        self._upload = BackgroundUpload("checkpoint")
        self.saved: int | None = None
        """Iteration of the latest save."""

    def save(self, learner: Learner, at: TrainState) -> None:
        """Write this rank's files and begin to upload them. Every rank calls it after the same step."""
        self.wait()
        folder = self._context.scratch / f"checkpoint-{at.iteration}"
        folder.mkdir(exist_ok=True)
        names = []
        for name, tensors in checkpoint_files(learner).items():
            save_file(tensors, folder / name, metadata={"format": "pt"})
            names.append(name)
        self.saved = at.iteration
        self._upload.start(self._write, at, folder, names, learner.student.shape.parts)

    def wait(self) -> None:
        """Return once the checkpoint that is being uploaded, if any, exists. Raises on every rank what
        prevented it."""
        self._upload.wait()

    def check(self) -> None:
        """Raise the error of an upload that has failed; does not wait."""
        self._upload.check()

    def close(self) -> None:
        """End the thread, after the upload that may still be running."""
        self._upload.close()

    def _write(self, at: TrainState, folder: Path, names: list[str], parts: dict[str, Any]) -> None:
        bucket, run, began = self._context.bucket, self._context.run, time.monotonic()
        key = paths.checkpoint(run, at.stage, at.iteration)
        # a killed attempt may have left files there, or the checkpoint there was rejected
        self._agree(_fault(lambda: bucket.delete_prefix(key)) if self._report else None)
        stored: list[Stored] = []
        fault = _fault(lambda: stored.extend(self._put(key, folder / name) for name in names))
        stored_by_rank = self._group.gather(stored)
        self._agree(fault)
        if self._report:
            self._report.flush_metrics()
            subjects = [one.subject(key) for of_rank in stored_by_rank for one in of_rank]
            facts: dict[str, Any] = {"ranks": distributed.world_size(), "position": at.dump()}
            if parts:
                facts[PARTS_FACT] = parts
            statement = manifest.statement(
                "checkpoint", subjects, facts, self._context.provenance, self._inputs
            )
            written = manifest.write(bucket, paths.manifest(key), statement)
            self._report.update(checkpoint=checkpoint_facts(bucket, written, at))
            uploaded = Sample(CHECKPOINT_UPLOAD_SECONDS, time.monotonic() - began)
            self._context.board.metrics.record([uploaded, Sample(CHECKPOINT_TIME, time.time())])
            log.info(
                "Wrote checkpoint %s: %d files, %.1f MB",
                bucket.url(key),
                len(subjects),
                sum(one.size for one in subjects) / 1e6,
            )
            prune(bucket, paths.checkpoints(run, at.stage), run.spec.training.checkpoint.keep)

    def _put(self, key: str, path: Path) -> Stored:
        stored = self._context.bucket.put_file(
            f"{key}/{path.name}", path, self._context.provenance.metadata()
        )
        path.unlink()
        return stored

    def _agree(self, fault: str | None) -> None:
        """Raise Retriable on every rank if any rank has a fault: a checkpoint is complete or does not
        exist."""
        for rank, found in enumerate(self._group.gather(fault)):
            if found:
                raise Retriable(f"rank {rank} could not upload its part of a checkpoint: {found}")


def prune(bucket: Bucket, folder: str, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints of a stage, and what killed attempts left before those.
    The stage's last always stays, and so does what no job writes there."""
    kept = list_iterations(bucket, folder)[:keep]
    names = {found.key.removeprefix(folder + "/").partition("/")[0] for found in bucket.list(folder + "/")}
    present = {iteration for name in names if (iteration := iteration_of(name)) is not None}
    for iteration in sorted(present - set(kept)):
        if iteration < kept[0]:
            bucket.delete_prefix(f"{folder}/{iteration}")


def _fault(action: Callable[[], object]) -> str | None:
    """The error of `action` as a message for the other ranks; None if it succeeded."""
    try:
        action()
    except (StorageError, OSError) as error:
        return str(error)
    return None
