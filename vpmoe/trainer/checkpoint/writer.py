"""Checkpoints: written to local disk while training waits, to the bucket while it goes on. restore.py reads them back.

checkpoints/<stage>/<iteration>/ holds a file for each rank, rank-00003.safetensors, with that rank's named ranges of the fp32 state
(vpmoe.model.state; a tensor's key is `name[start:stop]`) and its random state; buffers.safetensors of rank 0; and, when all of them are
there, manifest.json with the Position among its facts. Before the manifest nothing of it exists, so a kill at any moment loses at most
the steps since the checkpoint before.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from vpmoe.checkpoint.train_state import TrainState, facts_of, iterations
from vpmoe.failure import Retriable
from vpmoe.model import distributed, state
from vpmoe.model.learner import Learner
from vpmoe.storage import Bucket, StorageError, Stored, manifest, paths
from vpmoe.storage.manifest import Input
from vpmoe.trainer.context import ObjectGroup, StageContext
from vpmoe.trainer.reporting.uploader import ProgressUploader

log = logging.getLogger(__name__)

BUFFERS = "buffers.safetensors"
PATIENCE = timedelta(hours=1)
"""How much longer one rank's upload may take than another's."""


def rank_file(rank: int) -> str:
    """Name of a rank's file in a checkpoint."""
    return f"rank-{rank:05d}.safetensors"


def files(learner: Learner) -> dict[str, dict[str, Tensor]]:
    """This rank's files of a checkpoint and what stands in them, copied to the CPU."""
    made: dict[str, dict[str, Tensor]] = {}
    for held in state.slices(learner):
        file = BUFFERS if held.name.startswith("buffer/") else rank_file(distributed.rank())
        made.setdefault(file, {})[f"{held.name}[{held.start}:{held.stop}]"] = held.tensor.detach().to(
            "cpu", copy=True
        )
    rank = distributed.rank()
    random = {
        f"random/{rank}/{name}[0:{values.numel()}]": values for name, values in state.random_state().items()
    }
    made.setdefault(rank_file(rank), {}).update(random)
    return made


class Checkpoints:
    """Writes a stage's checkpoints, one at a time: a save waits for the upload of the one before."""

    def __init__(self, task: StageContext, inputs: list[Input], report: ProgressUploader | None) -> None:
        """`inputs`: what the stage's weights come from, for the manifests. Every rank makes its own; rank 0 gives its report."""
        self._task = task
        self._inputs = inputs
        self._report = report
        self._talk = ObjectGroup(PATIENCE)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._upload: Future[None] | None = None
        self.saved: int | None = None
        """Iteration of the latest save."""

    def save(self, learner: Learner, position: TrainState) -> None:
        """Write this rank's files and begin to upload them. Every rank calls it after the same step."""
        self.wait()
        folder = self._task.scratch / f"checkpoint-{position.iteration}"
        folder.mkdir(exist_ok=True)
        names = []
        for name, tensors in files(learner).items():
            save_file(tensors, folder / name, metadata={"format": "pt"})
            names.append(name)
        self.saved = position.iteration
        self._upload = self._thread.submit(self._finish, position, folder, names)

    def wait(self) -> None:
        """Return once the checkpoint being uploaded, if any, exists. Raises what kept it from existing, on every rank."""
        if self._upload:
            upload, self._upload = self._upload, None
            upload.result()

    def check(self) -> None:
        """Raise what made an upload fail, if one did; does not wait."""
        if self._upload and self._upload.done():
            self.wait()

    def close(self) -> None:
        """End the thread, after the upload that may be going on."""
        self._thread.shutdown()

    def _finish(self, position: TrainState, folder: Path, names: list[str]) -> None:
        bucket, run = self._task.bucket, self._task.run
        key = paths.checkpoint(run, position.stage, position.iteration)
        if self._report:  # what a killed attempt left there, or a checkpoint that was refused
            self._agree(_fault(lambda: bucket.delete_prefix(key)))
        else:
            self._agree(None)
        stored: list[Stored] = []
        fault = _fault(lambda: stored.extend(self._put(key, folder / name) for name in names))
        everyones = self._talk.gather(stored)
        self._agree(fault)
        if self._report:
            self._report.flush_metrics()  # a step that is not done again must have its line
            subjects = [one.subject(key) for ranks in everyones for one in ranks]
            facts = {"ranks": distributed.world_size(), "position": position.dump()}
            made = manifest.statement("checkpoint", subjects, facts, self._task.provenance, self._inputs)
            written = manifest.write(bucket, paths.manifest(key), made)
            self._report.update(checkpoint=facts_of(bucket, written, position))
            log.info(
                "Checkpoint %s: %d files, %.1f MB",
                bucket.url(key),
                len(subjects),
                sum(one.size for one in subjects) / 1e6,
            )
            prune(bucket, paths.checkpoints(run, position.stage), run.spec.training.checkpoint.keep)

    def _put(self, key: str, path: Path) -> Stored:
        stored = self._task.bucket.put_file(f"{key}/{path.name}", path, self._task.provenance.metadata())
        path.unlink()
        return stored

    def _agree(self, fault: str | None) -> None:
        """Raise Retriable on every rank where any rank has a fault: a checkpoint is all ranks' or nobody's."""
        for rank, word in enumerate(self._talk.gather(fault)):
            if word:
                raise Retriable(f"rank {rank} could not upload its part of a checkpoint: {word}")


def prune(bucket: Bucket, folder: str, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints of a stage, of which its last is always one, and what killed attempts left before it."""
    kept = iterations(bucket, folder)[:keep]
    there = {int(found.key.removeprefix(folder + "/").split("/")[0]) for found in bucket.list(folder + "/")}
    for iteration in sorted(there - set(kept)):
        if iteration < kept[0]:
            bucket.delete_prefix(f"{folder}/{iteration}")


def _fault(action: Callable[[], object]) -> str | None:
    """What went wrong in `action`, so that it can be said to the other ranks."""
    try:
        action()
    except (StorageError, OSError) as error:
        return str(error)
    return None
