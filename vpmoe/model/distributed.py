"""Process groups: torch.distributed and megatron-core's parallel state, and the collectives of the trainer.

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT define the group; without RANK the group is this process alone.
The code that starts the processes is in vpmoe/process/launcher.py.
"""

import os
from datetime import timedelta

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch import distributed as dist

TIMEOUT = timedelta(minutes=10)
"""Longest time in one collective. After it the process fails, and the next attempt starts from the last
checkpoint."""


def start(device: torch.device, expert_parallel: int = 1) -> None:
    """Join the other ranks: gloo on the CPU, NCCL on GPUs.

    Call it once per process: the launcher's store keeps the addresses of the first group and would return
    them to a second. Raises ValueError if `expert_parallel` does not divide the number of ranks.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if device.type == "cuda" else None)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
    set_expert_parallel(expert_parallel)


def set_expert_parallel(expert_parallel: int) -> None:
    """Create megatron's groups: all ranks are data parallel, and each run of `expert_parallel` ranks shares
    one set of experts."""
    if expert_parallel < 1 or world_size() % expert_parallel:
        raise ValueError(
            f"student.expertParallel: {expert_parallel} does not divide the {world_size()} ranks of this "
            "stage."
        )
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=expert_parallel,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60),
    )


def stop() -> None:
    """Destroy the process groups."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of every rank's value, on the CPU, in the dtype of `value`."""
    summed = value.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(summed)
    return summed.cpu()
