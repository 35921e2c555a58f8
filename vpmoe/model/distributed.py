"""Process groups: torch.distributed and megatron-core's parallel state, and the collectives of the trainer.

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT define the group; without RANK the group is this process alone.
The code that starts the processes is in vpmoe/process/launcher.py.
"""

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch import distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from vpmoe.failure import Retriable, Terminated

TIMEOUT = timedelta(minutes=10)
"""Longest time in one collective. After it the process fails, and the next attempt starts from the last
checkpoint."""
CONNECT_TIMEOUT = timedelta(seconds=5)
"""Longest time in one attempt to reach the store of rank 0."""
POLL_SECONDS = 0.1


def start(
    device: torch.device, expert_parallel: int = 1, check_stop: Callable[[], None] = lambda: None
) -> None:
    """Join the other ranks: gloo on the CPU, NCCL on GPUs.

    Call it once per process: the store keeps the addresses of the first group and would return them to a
    second. `check_stop` is called while it waits for the other ranks; it raises if the process should stop.
    Raises Retriable if they do not join, and ValueError if `expert_parallel` does not divide their number.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    store = meet(rank, ranks, check_stop) if "RANK" in os.environ else dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=ranks,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    set_expert_parallel(expert_parallel)


def meet(rank: int, ranks: int, check_stop: Callable[[], None]) -> Store:
    """The store of rank 0, once all ranks have joined it.

    init_process_group would wait for them where a process cannot be stopped: a rank that was stopped before
    it joined would leave the others waiting. Raises as agree_to_start does.
    """
    store = _connect(rank, check_stop)
    store.set(f"joined {rank}", "")
    agree_to_start(store, [f"joined {other}" for other in range(ranks)], check_stop, TIMEOUT)
    return store


def agree_to_start(
    store: Store, members: Sequence[str], check_stop: Callable[[], None], patience: timedelta
) -> None:
    """Return once the store has the keys of all members.

    All members come to one decision: if one stops while it waits, none goes on. Raises what `check_stop`
    raises, Terminated if another member stops, and Retriable if a member does not join within `patience` or
    the process of the store has ended.
    """
    deadline = time.monotonic() + patience.total_seconds()
    try:
        while not store.check(["decision"]):
            if store.check(list(members)):
                store.compare_set("decision", "", "start")
            try:
                check_stop()
            except Exception:
                if store.compare_set("decision", "", "stop") == b"stop":
                    raise
            if time.monotonic() > deadline:
                missing = ", ".join(member for member in members if not store.check([member]))
                raise Retriable(f"waited {patience} for: {missing}. The logs of its processes say why.")
            time.sleep(POLL_SECONDS)
        if store.get("decision") == b"stop":
            raise Terminated("another process was asked to stop before training began; nothing was lost")
    except dist.DistError as error:
        check_stop()
        message = str(error).partition("\n")[0].rstrip(".")
        raise Retriable(f"a process ended before all had joined: {message}.") from error


def _connect(rank: int, check_stop: Callable[[], None]) -> Store:
    """The store at MASTER_ADDR and MASTER_PORT, which rank 0 serves."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0:
        return TCPStore(address, port, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
    return connect(address, port, "rank 0", check_stop, TIMEOUT)


def connect(
    address: str, port: int, server: str, check_stop: Callable[[], None], patience: timedelta
) -> TCPStore:
    """The store that the process `server` serves there. Raises Retriable if it does not answer within
    `patience`."""
    deadline = time.monotonic() + patience.total_seconds()
    while True:
        check_stop()
        try:
            store = TCPStore(address, port, timeout=CONNECT_TIMEOUT, wait_for_workers=False)
        except dist.DistError as error:
            if time.monotonic() > deadline:
                message = str(error).partition("\n")[0].rstrip(".")
                raise Retriable(f"{server} does not answer at {address}:{port} ({message}).") from error
        else:
            store.set_timeout(patience)
            return store


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
