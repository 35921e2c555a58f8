"""A checkpoint as it lies in the bucket: which numbers of which tensor stand where in its files, and the weights by name.

No torch.distributed and no megatron-core: the inference image exports a student from here. Bringing a learner, and its ranks, to a
checkpoint is restore.py's business.
"""

import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from vpmoe.checkpoint.train_state import TrainState
from vpmoe.storage import Bucket, StorageError, Subject, manifest, paths
from vpmoe.storage.manifest import Manifest

KEY = re.compile(r"(.+)\[(\d+):(\d+)\]")
WEIGHTS = ("main/", "buffer/")
"""What the names begin with that a student consists of; the others are the optimizer's, and random state."""


class CheckpointRejected(Exception):
    """A checkpoint that is not what it was when it was written, or of another student. Said on every rank in the same words."""


class TensorSlice(NamedTuple):
    """Numbers [start, stop) of a tensor, under `key` in `file`."""

    start: int
    stop: int
    file: Subject
    key: str
    at: int
    """Byte of the file at which they begin."""
    dtype: str
    """safetensors' name of their type."""


Pieces = Mapping[str, Sequence[TensorSlice]]
"""By tensor, in order."""


def pieces_in(bucket: Bucket, files: Iterable[Subject]) -> dict[str, list[TensorSlice]]:
    """What stands where, from the files' headers (safetensors: 8 bytes of length, then JSON, then the numbers)."""
    pieces: dict[str, list[TensorSlice]] = {}
    for file in files:
        (length,) = struct.unpack("<Q", bucket.read(file, 0, 8))
        for key, held in json.loads(bucket.read(file, 8, 8 + length)).items():
            if parsed := KEY.fullmatch(key):
                at = 8 + length + held["data_offsets"][0]
                pieces.setdefault(parsed[1], []).append(
                    TensorSlice(int(parsed[2]), int(parsed[3]), file, key, at, held["dtype"])
                )
    for of in pieces.values():
        of.sort(key=lambda piece: piece[:2])
    return pieces


def total(pieces: Sequence[TensorSlice]) -> int:
    """Numbers in all of them."""
    return sum(piece.stop - piece.start for piece in pieces)


def check_covers(name: str, pieces: Sequence[TensorSlice], size: int) -> None:
    """Raises Refused where the pieces are not [0, size) without gap or overlap."""
    at = 0
    for piece in pieces:
        if piece.start != at:
            break
        at = piece.stop
    else:
        if at == size:
            return
    raise CheckpointRejected(
        f"It holds {at} of the {size} numbers of {name}, or some twice: it is of another student, or of another version."
    )


@dataclass(frozen=True)
class Weights:
    """The weights and expert biases of a checkpoint. Nothing of them is on this machine: each read fetches what it asks for."""

    bucket: Bucket
    manifest: Manifest
    position: TrainState
    pieces: Pieces

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers in each tensor."""
        return {name: of[-1].stop for name, of in self.pieces.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Numbers [start, stop) of a tensor, flat, fp32. Raises StorageError where the blocks that they lie in are not what they were."""
        found = []
        for piece in self.pieces[name]:
            first, last = max(start, piece.start) - piece.start, min(stop, piece.stop) - piece.start
            if first < last:
                data = self.bucket.read(piece.file, piece.at + 4 * first, piece.at + 4 * last)
                found.append(torch.frombuffer(bytearray(data), dtype=torch.float32))
        return torch.cat(found) if len(found) != 1 else found[0]


def weights_in(bucket: Bucket, folder: str) -> Weights:
    """The weights of the checkpoint in `folder`, from its manifest and its files' headers.

    Raises Refused, with the checkpoint's address, where it is damaged or its pieces do not make whole tensors; StorageError where the
    store does not answer.
    """
    try:
        stored = manifest.load(bucket, paths.manifest(folder))
        position = TrainState.model_validate(stored.facts.get("position"))
        pieces = {
            name: of
            for name, of in pieces_in(bucket, stored.subjects.values()).items()
            if name.startswith(WEIGHTS)
        }
        for name, of in pieces.items():
            check_covers(name, of, of[-1].stop)
            if other := {piece.dtype for piece in of} - {"F32"}:
                raise CheckpointRejected(
                    f"{name} is {', '.join(sorted(other))}, wanted F32: it is of another version."
                )
    except StorageError as error:
        if error.reason not in ("Altered", "Missing"):
            raise
        raise CheckpointRejected(f"checkpoint {bucket.url(folder)} cannot be used. {error}") from error
    except (ValidationError, CheckpointRejected) as error:
        raise CheckpointRejected(f"checkpoint {bucket.url(folder)} cannot be used. {error}") from error
    return Weights(bucket, stored, position, pieces)
