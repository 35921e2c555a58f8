"""Reading checkpoints back: by named ranges, so the number of ranks that wrote one does not matter, and not before it is proved.

All of a checkpoint that this rank needs comes to local disk, block by block against its hashes, and all ranks agree that it did, before any
weight is touched. What to do about one that is refused is start.py's business, writing them checkpoint.py's.
"""

import fcntl
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from vpmoe.checkpoint.format import WEIGHTS, CheckpointRejected, TensorSlice, check_covers, pieces_in, total
from vpmoe.checkpoint.train_state import TrainState
from vpmoe.model import distributed, state
from vpmoe.model.learner import Learner
from vpmoe.storage import Bucket, StorageError, Subject, manifest, paths
from vpmoe.storage.manifest import Manifest
from vpmoe.trainer.context import ObjectGroup

PATIENCE = timedelta(hours=1)
"""How much longer one rank may read than another."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was proved, as far as this rank needs it."""

    manifest: Manifest
    position: TrainState
    pieces: dict[str, list[TensorSlice]]
    """By tensor, in order, without gaps."""
    files: dict[str, Path]
    """By the sha256 of the file's content."""
    anew: frozenset[str]
    """Parameters that it does not have and need not have."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Numbers [start, stop) of a tensor, flat."""
        found = []
        for piece in self.pieces[name]:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                with safe_open(self.files[piece.file.sha256], framework="pt") as file:
                    found.append(file.get_slice(piece.key)[first - piece.start : last - piece.start])
        return torch.cat(found) if len(found) != 1 else found[0]


class Reader:
    """Reads checkpoints into one learner. Every rank makes its own, and they read together."""

    def __init__(self, scratch: Path, learner: Learner) -> None:
        self._scratch = scratch
        self._learner = learner
        self._talk = ObjectGroup(PATIENCE)

    def restore(
        self, bucket: Bucket, folder: str, *, moments: bool, begins: bool = False
    ) -> tuple[Manifest, TrainState]:
        """Take the weights, and with `moments` the optimizer and random state, of the checkpoint in `folder`.

        Where a stage `begins` from it, parameters that not every stage has (state.NOT_EVERY_STAGES) stay as they were built, with empty
        moments, if it has none of that size.

        Raises Refused, on every rank and with the learner untouched, where any rank cannot have what it needs; StorageError where the
        store does not answer.
        """
        fault, found = None, None
        try:
            found = self._prove(bucket, folder, moments, begins)
        except StorageError as error:
            if error.reason not in ("Altered", "Missing"):
                raise
            fault = str(error)
        except (ValidationError, CheckpointRejected) as error:
            fault = str(error)
        faults = {word: rank for rank, word in reversed(list(enumerate(self._talk.gather(fault)))) if word}
        if faults or found is None:
            said = " ".join(f"Rank {rank}: {word}" for word, rank in faults.items())
            raise CheckpointRejected(f"checkpoint {bucket.url(folder)} cannot be used. {said}")
        state.restore(
            self._learner, found.read, found.position.iteration if moments else 0, moments, found.anew
        )
        own = f"random/{distributed.rank()}/"
        if moments and found.manifest.facts["ranks"] == distributed.world_size():
            names = [name for name in found.pieces if name.startswith(own)]
            state.set_random_state(
                {name.removeprefix(own): found.read(name, 0, found.pieces[name][-1].stop) for name in names}
            )
        self._talk.gather(None)  # the ranks of a pod share the files
        for path in found.files.values():
            path.unlink(missing_ok=True)
        return found.manifest, found.position

    def _prove(self, bucket: Bucket, folder: str, moments: bool, begins: bool) -> Checkpoint:
        """The checkpoint, with every file that this rank needs brought here and proved."""
        stored = manifest.load(bucket, paths.manifest(folder))
        position = TrainState.model_validate(stored.facts.get("position"))
        pieces = pieces_in(bucket, stored.subjects.values())
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
        anew = frozenset(
            name for name, size in optional.items() if total(pieces.get(f"main/{name}", [])) != size
        )
        sizes = {name: size for name, size in sizes.items() if name.partition("/")[2] not in anew}
        for name, size in sizes.items():
            check_covers(name, pieces.get(name, []), size)
        ranges = [
            (held.name, held.start, held.stop) for held in state.slices(self._learner) if held.name in sizes
        ]
        ranges += [(name, 0, size) for name, size in sizes.items() if name.startswith("buffer/")]
        ranges += [
            (name, 0, of[-1].stop)
            for name, of in pieces.items()
            if name.startswith(f"random/{distributed.rank()}/")
        ]
        needed = {
            piece.file
            for name, start, stop in ranges
            for piece in pieces[name]
            if piece.start < stop and start < piece.stop
        }
        return Checkpoint(
            stored, position, pieces, {file.sha256: self._bring(bucket, file) for file in needed}, anew
        )

    def _bring(self, bucket: Bucket, file: Subject) -> Path:
        """A file of the checkpoint on this pod's disk; the first rank that wants it fetches it."""
        path = self._scratch / f"{file.sha256}.safetensors"
        with path.with_suffix(".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                bucket.download(file, path)
        return path
