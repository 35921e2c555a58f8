"""Process groups: torch.distributed and megatron-core's parallel state, and the few words that the trainer
says through them.

The launcher's environment decides (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); without it the process is a
world of one. Starting the processes is vpmoe.training's business.
"""

import os
from datetime import timedelta

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch import distributed as dist

TIMEOUT = timedelta(minutes=10)
"""After so long in one collective a peer is taken for dead: the process fails, and another attempt starts
from the last checkpoint."""


def start(device: torch.device, expert_parallel: int = 1) -> None:
    """Join the other ranks: gloo on the CPU, NCCL on GPUs. Raises ValueError where the ranks do not divide by
    `expert_parallel`.

    Once a process: a launcher's store remembers the addresses of a first group and would give them to a
    second.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if device.type == "cuda" else None)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
    set_expert_parallel(expert_parallel)


def set_expert_parallel(expert_parallel: int) -> None:
    """Give megatron its groups of the ranks that joined: all of them data parallel, runs of `expert_parallel`
    sharing the experts."""
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
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of every rank's value, on the CPU; integers and float64 add up exactly as far as they go."""
    summed = value.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(summed)
    return summed.cpu()
