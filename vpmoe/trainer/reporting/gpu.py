"""Utilisation and free memory of the ranks' GPUs, from NVML (which torch asks through nvidia-ml-py) and
torch's allocator.

On the CPU there is nothing to read: the metrics then have null and the reason, never a zero. The record, and
how the other roles read their GPUs, are in vpmoe.process.gpu.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vpmoe.process.gpu import NO_GPU, GpuUse


@dataclass(frozen=True)
class RankReading:
    """The GPU of one rank at one time; NaN without a GPU."""

    utilisation: float
    """Share of the last sampling period in which a kernel ran, 0 to 1 (NVML)."""
    headroom: float
    """Bytes that were free at the peak of memory use since the last reading."""


def use_of_ranks(summed: Tensor) -> GpuUse:
    """The ranks' GPUs from the sum of the ranks' vectors (as_vector): mean utilisation and least headroom."""
    utilisation_R, headroom_R = summed.view(2, -1)
    if bool(utilisation_R.isnan().any()):
        return GpuUse(utilisation=None, memory_headroom=None, reason=NO_GPU)
    return GpuUse(
        utilisation=float(utilisation_R.mean()), memory_headroom=float(headroom_R.min()), reason=None
    )


def read_gpu(device: torch.device) -> RankReading:
    """The GPU of this process since the last call."""
    if device.type != "cuda":
        return RankReading(math.nan, math.nan)
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.max_memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return RankReading(torch.cuda.utilization(device) / 100, free + unused)


def as_vector(reading: RankReading, rank: int, ranks: int) -> Tensor:
    """[2·ranks] float64, zero but for this rank's two numbers: summed over the ranks it holds the readings of
    all."""
    vector = torch.zeros(2, ranks, dtype=torch.float64)
    vector[:, rank] = torch.tensor([reading.utilisation, reading.headroom])
    return vector.flatten()
