"""Reads the tensors of a checkpoint in threads, for a GPU into pinned memory.

A copy from a mapped file to a GPU goes through one thread and the driver's own buffers, at some 7 GB/s. From
pinned memory it is as fast as the bus, and threads fill that memory meanwhile.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from vpmoe.checkpoint.safetensors_header import LENGTH_BYTES, read_folder
from vpmoe.model.hf_export import SAFETENSORS

BUFFERS = 3
"""Tensors in memory at the same time: one that is used, the others are read."""
PIECE = 8 << 20
"""Bytes that a thread reads at once."""
THREADS = 8


class WeightReader:
    """Keeps its buffers, each as large as the largest tensor, for the next checkpoint: to pin memory takes
    longer than to fill it."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._buffers: list[Tensor] = []

    def read(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """All tensors of a checkpoint that hf_export.check_export has accepted, by name.

        A tensor is valid until the next one is asked for. Raises OSError if a file cannot be read, EOFError
        if it ends early.
        """
        stored = sorted(read_folder(folder).items(), key=lambda item: (item[1].file, item[1].start))
        dtype_of = {name: dtype for dtype, name in SAFETENSORS.items()}
        self._allocate(max(one.stop - one.start for _, one in stored))
        waiting: deque[tuple[str, Tensor, list[Future[None]]]] = deque()
        with ExitStack() as opened, ThreadPoolExecutor(THREADS) as pool:
            files = {
                name: opened.enter_context((folder / name).open("rb", buffering=0)).fileno()
                for name in dict.fromkeys(one.file for _, one in stored)
            }
            data_of = {
                name: LENGTH_BYTES + int.from_bytes(os.pread(file, LENGTH_BYTES, 0), "little")
                for name, file in files.items()
            }
            for (name, one), buffer in zip(stored, cycle(self._buffers), strict=False):
                if len(waiting) == BUFFERS:
                    yield _complete(*waiting.popleft())  # afterwards its buffer, which is this one, is free
                held = buffer[: one.stop - one.start]
                reads = [
                    pool.submit(
                        _read, files[one.file], held[at : at + PIECE], data_of[one.file] + one.start + at
                    )
                    for at in range(0, len(held), PIECE)
                ]
                waiting.append((name, held.view(dtype_of[one.dtype]).view(one.shape), reads))
            while waiting:
                yield _complete(*waiting.popleft())

    def _allocate(self, size: int) -> None:
        if not self._buffers or len(self._buffers[0]) < size:
            self._buffers = [
                torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned) for _ in range(BUFFERS)
            ]


def _complete(name: str, tensor: Tensor, reads: list[Future[None]]) -> tuple[str, Tensor]:
    for read in reads:
        read.result()
    return name, tensor


def _read(file: int, into: Tensor, start: int) -> None:
    rest = memoryview(into.numpy())
    while rest:
        if not (count := os.preadv(file, [rest], start)):
            raise EOFError(f"a file of the checkpoint ends before byte {start + 1}")
        rest, start = rest[count:], start + count
