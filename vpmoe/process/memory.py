"""Settings of a process's memory: glibc's allocator on the CPU, and Python's garbage collector while modules
are imported."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3)."""


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks in this process instead of returning them to the kernel.

    Logits are hundreds of megabytes. Otherwise each forward pass gets new pages, which the kernel zeroes:
    that takes a third of a training step of `tiny`, and half of a teacher's time. It applies to memory that
    is allocated from now on.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection in the block, and none of what is alive at its end from then on.

    For imports. torch, vLLM and megatron-core make objects that live as long as the process. To look through
    them again and again took a fifth of the start of an engine or a trainer.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
