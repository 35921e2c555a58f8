"""The checkpoint format: which slice of which tensor is where in a checkpoint's files, and access to the
weights by name.

No torch.distributed and no megatron-core: the inference image exports a student with this module. The trainer
restores a learner in vpmoe.trainer.checkpoint.reader.
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
"""Prefixes of the names of the student's tensors. All others are optimizer and random state."""


class CheckpointRejected(Exception):
    """A checkpoint is damaged or belongs to another student. All ranks raise it with the same message."""


class TensorSlice(NamedTuple):
    """Elements [start, stop) of a flattened tensor, under `key` in `file`."""

    start: int
    stop: int
    file: Subject
    key: str
    offset: int
    """Byte offset in the file."""
    dtype: str
    """safetensors' name of the type."""


TensorSlices = Mapping[str, Sequence[TensorSlice]]
"""Slices by tensor name, sorted by start."""


def read_slices(bucket: Bucket, files: Iterable[Subject]) -> dict[str, list[TensorSlice]]:
    """The tensor slices in these files, from their headers (safetensors: 8 bytes length, JSON, data)."""
    slices: dict[str, list[TensorSlice]] = {}
    for file in files:
        (length,) = struct.unpack("<Q", bucket.read(file, 0, 8))
        for key, entry in json.loads(bucket.read(file, 8, 8 + length)).items():
            if parsed := KEY.fullmatch(key):
                offset = 8 + length + entry["data_offsets"][0]
                slices.setdefault(parsed[1], []).append(
                    TensorSlice(int(parsed[2]), int(parsed[3]), file, key, offset, entry["dtype"])
                )
    for tensor_slices in slices.values():
        tensor_slices.sort(key=lambda one: one[:2])
    return slices


def count_elements(slices: Sequence[TensorSlice]) -> int:
    """The number of elements in all slices."""
    return sum(one.stop - one.start for one in slices)


def check_coverage(name: str, slices: Sequence[TensorSlice], size: int) -> None:
    """Raises CheckpointRejected if the slices do not cover [0, size) without gap or overlap."""
    covered = 0
    for one in slices:
        if one.start != covered:
            break
        covered = one.stop
    else:
        if covered == size:
            return
    raise CheckpointRejected(
        f"Its slices cover {covered} of the {size} elements of {name}, or overlap: it belongs to another "
        "student or to another version of vpmoe."
    )


@dataclass(frozen=True)
class Weights:
    """The weights and expert biases of a checkpoint. They are not downloaded: each `read` fetches the
    requested range."""

    bucket: Bucket
    manifest: Manifest
    train_state: TrainState
    slices: TensorSlices

    @property
    def sizes(self) -> dict[str, int]:
        """Elements of each tensor."""
        return {name: tensor_slices[-1].stop for name, tensor_slices in self.slices.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened tensor, fp32. Raises StorageError if a block differs from its
        manifest."""
        found = []
        for one in self.slices[name]:
            first, last = max(start, one.start) - one.start, min(stop, one.stop) - one.start
            if first < last:
                data = self.bucket.read(one.file, one.offset + 4 * first, one.offset + 4 * last)
                found.append(torch.frombuffer(bytearray(data), dtype=torch.float32))
        return torch.cat(found) if len(found) != 1 else found[0]


def open_weights(bucket: Bucket, folder: str) -> Weights:
    """The weights of the checkpoint in `folder`, from its manifest and its files' headers.

    Raises CheckpointRejected, with the checkpoint's URL, if it is damaged or its slices do not make whole
    tensors; StorageError if the store does not answer.
    """
    try:
        stored = manifest.load(bucket, paths.manifest(folder))
        train_state = TrainState.model_validate(stored.facts.get("position"))
        slices = {
            name: tensor_slices
            for name, tensor_slices in read_slices(bucket, stored.subjects.values()).items()
            if name.startswith(WEIGHTS)
        }
        for name, tensor_slices in slices.items():
            check_coverage(name, tensor_slices, tensor_slices[-1].stop)
            if other := {one.dtype for one in tensor_slices} - {"F32"}:
                raise CheckpointRejected(
                    f"{name} is {', '.join(sorted(other))}, expected F32: another version of vpmoe wrote it."
                )
    except StorageError as error:
        if error.reason not in ("Altered", "Missing"):
            raise
        raise CheckpointRejected(f"checkpoint {bucket.url(folder)} cannot be used. {error}") from error
    except (ValidationError, CheckpointRejected) as error:
        raise CheckpointRejected(f"checkpoint {bucket.url(folder)} cannot be used. {error}") from error
    return Weights(bucket, stored, train_state, slices)
