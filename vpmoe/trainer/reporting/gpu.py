"""What one rank's GPU is doing, from NVML (torch asks it by nvidia-ml-py) and from torch's allocator.

On the CPU there is nothing to read, and that is said: null with the reason, never a zero.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NO_GPU = "computed on the CPU"


@dataclass(frozen=True)
class Reading:
    """One GPU at one time; nan where there is none."""

    utilisation: float
    """Share of the last sampling period in which a kernel ran, 0 to 1 (NVML)."""
    headroom: float
    """Bytes that were still free when most was in use since the last reading."""


def read(device: torch.device) -> Reading:
    """The GPU of this process since the last call."""
    if device.type != "cuda":
        return Reading(math.nan, math.nan)
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.max_memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return Reading(torch.cuda.utilization(device) / 100, free + unused)


def as_vector(reading: Reading, rank: int, ranks: int) -> Tensor:
    """[2·ranks] float64, zero but for this rank's two numbers: summed over the ranks it holds everybody's."""
    vector = torch.zeros(2, ranks, dtype=torch.float64)
    vector[:, rank] = torch.tensor([reading.utilisation, reading.headroom])
    return vector.flatten()


def summary(summed: Tensor) -> dict[str, float | str | None]:
    """The ranks' sum of as_vector, for metrics: mean utilisation and least headroom."""
    utilisation_R, headroom_R = summed.view(2, -1)
    if bool(utilisation_R.isnan().any()):
        return {"utilisation": None, "memoryHeadroom": None, "reason": NO_GPU}
    return {
        "utilisation": float(utilisation_R.mean()),
        "memoryHeadroom": float(headroom_R.min()),
        "reason": None,
    }
