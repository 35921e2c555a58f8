"""The checkpoint format: which slice of which tensor is where in a checkpoint's files, and access to the
weights by name.

No torch.distributed and no megatron-core: the inference image exports a student with this module. The trainer
restores a learner in vpmoe.trainer.checkpoint.reader.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from vpmoe.checkpoint.safetensors_header import (
    LENGTH_BYTES,
    InvalidCheckpoint,
    header_length,
    parse_header,
)
from vpmoe.checkpoint.train_state import TrainState
from vpmoe.storage import Bucket, StorageError, Subject, manifest, paths
from vpmoe.storage.manifest import Manifest
from vpmoe.storage.range_reader import RangeReader

KEY = re.compile(r"(.+)\[(\d+):(\d+)\]")
WEIGHTS = ("main/", "buffer/")
"""Prefixes of the names of the student's tensors. All others are optimizer and random state."""
RANDOM = "random/"
"""Prefix of the names of random states."""


KINDS = ("checkpoint", "init")
"""Kinds of manifest that name a student's weights in this format: of a checkpoint, and of initial weights,
which have neither optimizer nor random state."""
PARTS_FACT = "parts"
"""Fact of a checkpoint's manifest: the parts of its student's architecture (vpmoe.model.shapes). Absent if it
has none, as in checkpoints from before there were any."""


READ_TOGETHER = 4
"""Files of a model that are written at the same time from a checkpoint in a bucket. Most tensors are smaller
than a block, for which a store takes 0.1 s. vpmoe-6b's export holds up to 4 GB in memory."""


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
    """The tensor slices in these files, from their headers.

    Raises CheckpointRejected, with the file's name, if a header is damaged or a slice is not what its key
    says.
    """
    slices: dict[str, list[TensorSlice]] = {}
    for file in files:
        try:
            length = header_length(bucket.read(file, 0, min(LENGTH_BYTES, file.size)), file.size, file.key)
            begin = LENGTH_BYTES + length
            tensors = parse_header(bucket.read(file, LENGTH_BYTES, begin), file.size - begin, file.key)
        except InvalidCheckpoint as error:
            raise CheckpointRejected(f"{error} Another program wrote it.") from error
        for key, tensor in tensors.items():
            if parsed := KEY.fullmatch(key):
                start, stop = int(parsed[2]), int(parsed[3])
                if tensor.shape != (stop - start,):
                    raise CheckpointRejected(
                        f"{file.key}: {key} is {list(tensor.shape)}. Another program wrote it."
                    )
                slices.setdefault(parsed[1], []).append(
                    TensorSlice(start, stop, file, key, begin + tensor.start, tensor.dtype)
                )
    for tensor_slices in slices.values():
        tensor_slices.sort(key=lambda one: one[:2])
    return slices


def read_train_state(stored: Manifest) -> TrainState:
    """The train state in a checkpoint's manifest.

    Raises CheckpointRejected if the manifest is of something else, ValidationError if its state is invalid.
    """
    if stored.kind not in KINDS:
        raise CheckpointRejected(
            f"{stored.key} is the manifest of {stored.kind}, not of a checkpoint. Name a folder "
            "checkpoints/STAGE/ITERATION or init of a run."
        )
    return TrainState.model_validate(stored.facts.get("position"))


def count_elements(slices: Sequence[TensorSlice]) -> int:
    """The number of elements in all slices."""
    return sum(one.stop - one.start for one in slices)


def check_coverage(name: str, slices: Sequence[TensorSlice], size: int) -> None:
    """Raises CheckpointRejected if the slices do not cover [0, size) without gap or overlap, or are not of
    the type that the writer uses: bytes for random state, else F32."""
    expected = "U8" if name.startswith(RANDOM) else "F32"
    if other := {one.dtype for one in slices} - {expected}:
        raise CheckpointRejected(
            f"{name} is {', '.join(sorted(other))}, expected {expected}: another version of vpmoe wrote it."
        )
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
    requested range. Threads may share them."""

    reader: RangeReader
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
                data = self.reader.read(one.file, one.offset + 4 * first, one.offset + 4 * last)
                found.append(torch.frombuffer(data, dtype=torch.float32))
        return torch.cat(found) if len(found) != 1 else found[0]


def open_weights(bucket: Bucket, folder: str) -> Weights:
    """The weights of the checkpoint in `folder`, from its manifest and its files' headers.

    Raises CheckpointRejected, with the checkpoint's URL, if it is damaged or its slices do not make whole
    tensors; StorageError if the store does not answer.
    """
    try:
        stored = manifest.load(bucket, paths.manifest(folder))
        train_state = read_train_state(stored)
        slices = {
            name: tensor_slices
            for name, tensor_slices in read_slices(bucket, stored.subjects.values()).items()
            if name.startswith(WEIGHTS)
        }
        for name, tensor_slices in slices.items():
            check_coverage(name, tensor_slices, tensor_slices[-1].stop)
    except StorageError as error:
        if error.reason not in ("Altered", "Missing"):
            raise
        raise CheckpointRejected(f"checkpoint {bucket.url(folder)} cannot be used. {error}") from error
    except (ValidationError, CheckpointRejected) as error:
        raise CheckpointRejected(f"checkpoint {bucket.url(folder)} cannot be used. {error}") from error
    return Weights(RangeReader(bucket), stored, train_state, slices)
