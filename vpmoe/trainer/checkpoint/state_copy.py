"""A copy of this rank's state in host memory: a checkpoint's files, to be uploaded while training goes on.

The memory is allocated once and laid out as the files are, behind their headers. Beside a GPU it is pinned,
and a stream of its own fills it: training goes on with the next forward and backward, and waits only with
what would change the state (`hold_changes`). The writer is in writer.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpmoe.checkpoint.safetensors_header import TensorEntry, write_header
from vpmoe.failure import Retriable
from vpmoe.model import distributed, state
from vpmoe.model.learner import Learner

BUFFERS = "buffers.safetensors"
DTYPES = {torch.float32: "F32", torch.uint8: "U8"}
"""safetensors' names of the types in a state."""


def rank_file(rank: int) -> str:
    """Name of a rank's file in a checkpoint."""
    return f"rank-{rank:05d}.safetensors"


@dataclass(frozen=True)
class FileCopy:
    """One file of a checkpoint: a safetensors file in two parts."""

    header: bytes
    content: Tensor
    """All tensors' bytes, [N] uint8 in host memory."""

    @property
    def size(self) -> int:
        return len(self.header) + self.content.numel()

    def parts(self) -> Iterator[memoryview]:
        """The file's bytes, without a copy."""
        yield memoryview(self.header)
        yield memoryview(self.content.numpy())


class StateCopy:
    """The memory of one copy, which each `take` overwrites."""

    def __init__(self, learner: Learner) -> None:
        """Allocates the memory, as many bytes as this rank's files have. Raises Retriable if the host has not
        as much to pin."""
        self._cuda = learner.device.type == "cuda"
        self._stream = torch.cuda.Stream(learner.device) if self._cuda else None  # type: ignore[no-untyped-call]
        by_file: dict[str, dict[str, Tensor]] = {}
        for key, (file, tensor) in _live(learner).items():
            by_file.setdefault(file, {})[key] = tensor
        sizes = {file: sum(tensor.nbytes for tensor in tensors.values()) for file, tensors in by_file.items()}
        self.nbytes = sum(map(_aligned, sizes.values()))
        self.memory = torch.empty(self.nbytes, dtype=torch.uint8)
        """[nbytes], all files' contents."""
        if self._cuda:
            _pin(self.memory)
        self.files: Mapping[str, FileCopy] = {}
        """By name, this rank's files, as of the latest `take` once `wait` has returned."""
        self.views: dict[str, Tensor] = {}
        """By key, each tensor in that memory."""
        start = 0
        for file, tensors in by_file.items():
            stop = start
            # As the library: larger types first, so that every tensor is aligned, then by key.
            ordered = sorted(tensors, key=lambda key: (-tensors[key].itemsize, key))
            for key in ordered:
                begin, stop = stop, stop + tensors[key].nbytes
                self.views[key] = self.memory[begin:stop].view(tensors[key].dtype)
            entries = [
                TensorEntry(key, DTYPES[tensors[key].dtype], [tensors[key].numel()], tensors[key].nbytes)
                for key in ordered
            ]
            self.files = {**self.files, file: FileCopy(write_header(entries), self.memory[start:stop])}
            start = _aligned(stop)

    @torch.no_grad()
    def take(self, learner: Learner) -> None:
        """Begin to copy the learner's state as it is after the work that its device was given. On the CPU the
        copy is complete at the return. The copy before must not be in use."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(learner.device))
        with torch.cuda.stream(self._stream):  # does nothing without a stream
            for key, (_, tensor) in _live(learner).items():
                self.views[key].copy_(tensor.view(-1), non_blocking=self._cuda)

    def hold_changes(self) -> None:
        """Let the device change no state before the copy has it. The host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def wait(self) -> None:
        """Return once the copy is complete."""
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """Unpin the memory."""
        if self._cuda:
            self.wait()
            _runtime().cudaHostUnregister(self.memory.data_ptr())


def _live(learner: Learner) -> dict[str, tuple[str, Tensor]]:
    """By key the file and the tensor of everything in this rank's state; random states are on the CPU."""
    rank = distributed.rank()
    own = rank_file(rank)
    found = {
        f"{held.name}[{held.start}:{held.stop}]": (
            BUFFERS if held.name.startswith("buffer/") else own,
            held.tensor.detach(),
        )
        for held in state.slices(learner)
    }
    return found | {
        f"random/{rank}/{name}[0:{values.numel()}]": (own, values)
        for name, values in state.random_state().items()
    }


def _aligned(size: int) -> int:
    """The next multiple of 8: each file begins at one, so that its tensors are aligned."""
    return -(-size // 8) * 8


def _pin(memory: Tensor) -> None:
    """Pin exactly this memory. torch's own allocator of pinned memory would round up to a power of two, which
    of 10 GB makes 16."""
    if error := int(_runtime().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)):
        raise Retriable(
            f"{memory.nbytes / 1e9:.1f} GB of host memory for the copy of the state cannot be pinned (CUDA "
            f"error {error}). Raise the memory in runtime.resources.train; `vpmoe plan` prints what the "
            "copies need."
        )


def _runtime() -> Any:
    """CUDA's runtime."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
