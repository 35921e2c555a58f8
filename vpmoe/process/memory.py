"""The allocator's settings for a process that computes on the CPU."""

import ctypes

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
