"""Checkpoint reader: loads a checkpoint by named ranges, so the number of ranks that wrote it does not
matter.

Everything of the checkpoint that this rank needs is first downloaded and verified block by block against its
hashes. No weight is touched before all ranks agree that they have it. What happens after a rejection is in
resume.py; writing is in writer.py.
"""

import fcntl
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from vpmoe.checkpoint.format import (
    PARTS_FACT,
    RANDOM,
    WEIGHTS,
    CheckpointRejected,
    TensorSlice,
    check_coverage,
    count_elements,
    read_slices,
    read_train_state,
)
from vpmoe.checkpoint.train_state import TrainState
from vpmoe.model import distributed, state
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import other_parts
from vpmoe.storage import Bucket, StorageError, Subject, manifest, paths
from vpmoe.storage.manifest import Manifest
from vpmoe.trainer.context import ObjectGroup

PATIENCE = timedelta(hours=1)
"""How much longer one rank may read than another."""


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint of which everything that this rank needs is on disk and verified."""

    manifest: Manifest
    state: TrainState
    slices: dict[str, list[TensorSlice]]
    """By tensor, in order, without gaps."""
    files: dict[str, Path]
    """By the sha256 of the file's content."""
    unset: frozenset[str]
    """Parameters that the checkpoint does not have and need not have."""

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        """Numbers [start, stop) of a tensor, flat."""
        found = []
        for piece in self.slices[name]:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                with safe_open(self.files[piece.file.sha256], framework="pt") as file:
                    found.append(file.get_slice(piece.key)[first - piece.start : last - piece.start])
        return torch.cat(found) if len(found) != 1 else found[0]


class CheckpointReader:
    """Loads checkpoints into one learner. Every rank has a reader, and they load together."""

    def __init__(self, scratch: Path, learner: Learner) -> None:
        self._scratch = scratch
        self._learner = learner
        self._group = ObjectGroup(PATIENCE)

    def restore(
        self, bucket: Bucket, folder: str, *, moments: bool, begins: bool = False
    ) -> tuple[Manifest, TrainState]:
        """Load the weights, and with `moments` the optimizer and random state, of the checkpoint in `folder`.

        With `begins` a stage begins from it: then parameters that not every stage has
        (state.NOT_EVERY_STAGES) keep their initial values, with empty moments, if the checkpoint has none of
        that size.

        Raises CheckpointRejected, on every rank and with the learner untouched, if any rank cannot read what
        it needs; StorageError if the store does not answer.
        """
        fault, found = None, None
        try:
            found = self._verify(bucket, folder, moments, begins)
        except StorageError as error:
            if error.reason not in ("Altered", "Missing"):
                raise
            fault = str(error)
        except (ValidationError, CheckpointRejected) as error:
            fault = str(error)
        by_rank = list(enumerate(self._group.gather(fault)))
        first_rank_of = {fault: rank for rank, fault in reversed(by_rank) if fault}
        if first_rank_of or found is None:
            faults = " ".join(f"Rank {rank}: {fault}" for fault, rank in first_rank_of.items())
            raise CheckpointRejected(f"checkpoint {bucket.url(folder)} cannot be used. {faults}")
        state.restore(
            self._learner, found.read_range, found.state.updates if moments else 0, moments, found.unset
        )
        own = f"random/{distributed.rank()}/"
        if moments and found.manifest.facts.get("ranks") == distributed.world_size():
            names = [name for name in found.slices if name.startswith(own)]
            state.set_random_state(
                {
                    name.removeprefix(own): found.read_range(name, 0, found.slices[name][-1].stop)
                    for name in names
                }
            )
        self._group.gather(None)  # the ranks of a pod share the files
        for path in found.files.values():
            path.unlink(missing_ok=True)
        return found.manifest, found.state

    def _verify(self, bucket: Bucket, folder: str, moments: bool, begins: bool) -> VerifiedCheckpoint:
        """The checkpoint, with every file that this rank needs downloaded and verified."""
        stored = manifest.load(bucket, paths.manifest(folder))
        saved_state = read_train_state(stored)
        if difference := other_parts(stored.facts.get(PARTS_FACT, {}), self._learner.student.shape):
            raise CheckpointRejected(
                f"{difference}. Begin with a checkpoint of the same parts, or without one."
            )
        slices = read_slices(bucket, stored.subjects.values())
        sizes = {
            name: size
            for name, size in state.sizes(self._learner).items()
            if moments or name.startswith(WEIGHTS)
        }
        optional = {
            name: sizes[f"main/{name}"]
            for name in state.NOT_EVERY_STAGES
            if begins and f"main/{name}" in sizes
        }
        unset = frozenset(
            name for name, size in optional.items() if count_elements(slices.get(f"main/{name}", [])) != size
        )
        sizes = {name: size for name, size in sizes.items() if name.partition("/")[2] not in unset}
        for name, size in sizes.items():
            check_coverage(name, slices.get(name, []), size)
        ranges = [
            (held.name, held.start, held.stop) for held in state.slices(self._learner) if held.name in sizes
        ]
        ranges += [(name, 0, size) for name, size in sizes.items() if name.startswith("buffer/")]
        for name, of in slices.items():
            if name.startswith(f"{RANDOM}{distributed.rank()}/"):
                check_coverage(name, of, of[-1].stop)
                ranges.append((name, 0, of[-1].stop))
        needed = {
            piece.file
            for name, start, stop in ranges
            for piece in slices[name]
            if piece.start < stop and start < piece.stop
        }
        files = {file.sha256: self._download(bucket, file) for file in needed}
        return VerifiedCheckpoint(stored, saved_state, slices, files, unset)

    def _download(self, bucket: Bucket, file: Subject) -> Path:
        """A file of the checkpoint on this pod's disk. Of the pod's ranks the first that needs it downloads
        it."""
        path = self._scratch / f"{file.sha256}.safetensors"
        with path.with_suffix(".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                bucket.download(file, path)
        return path
