"""Collectives of the ranks that share a set of experts: tokens are gathered before the experts, and what each
rank's experts add to them is summed and scattered after.

Every rank then computes, for the tokens of all ranks, those choices that are of its own experts. Sizes follow
from the shape of a microbatch, so no rank reads on the host how many rows come from another; all ranks of a
group need microbatches of the same shapes. Exchanging the rows of choices instead would receive
choices · (R − 1) / R rows a token with R ranks, gathering receives R − 1: less with 2 ranks and four choices,
as much with 4.
"""

from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup, Work


def all_gather(x_N: Tensor, group: ProcessGroup) -> Tensor:
    """[R · N, …]: the tensors [N, …] of all R ranks, in their order."""
    whole = _room(x_N, group)
    dist.all_gather_into_tensor(whole, x_N.contiguous(), group=group)
    return whole


def start_all_gather(x_N: Tensor, group: ProcessGroup) -> tuple[Tensor, Work]:
    """all_gather of a contiguous tensor beside what follows: its result may be read after `wait` of the work.
    On a GPU the stream waits, not the host."""
    whole = _room(x_N, group)
    work = dist.all_gather_into_tensor(whole, x_N, group=group, async_op=True)
    assert work is not None  # it is None in a process outside the group
    return whole, work


def _room(x_N: Tensor, group: ProcessGroup) -> Tensor:
    return x_N.new_empty(group.size() * len(x_N), *x_N.shape[1:])


def reduce_scatter(x_M: Tensor, group: ProcessGroup) -> Tensor:
    """[M / R, …]: this rank's part of the sum of the R ranks' tensors [M, …]."""
    own = x_M.new_empty(len(x_M) // group.size(), *x_M.shape[1:])
    dist.reduce_scatter_tensor(own, x_M.contiguous(), group=group)
    return own


def gathered(x_N: Tensor, group: ProcessGroup) -> Tensor:
    """all_gather with a gradient: reduce_scatter of that of every rank."""
    whole: Tensor = _Gathered.apply(x_N, group)  # type: ignore[no-untyped-call]
    return whole


def scattered(x_M: Tensor, group: ProcessGroup) -> Tensor:
    """reduce_scatter with a gradient: all_gather of that of every rank."""
    own: Tensor = _Scattered.apply(x_M, group)  # type: ignore[no-untyped-call]
    return own


def check_same_shapes(shapes: list[tuple[int, ...]], group: ProcessGroup, device: torch.device) -> None:
    """Raise ValueError on every rank of the group unless all have these shapes of microbatches, in this
    order. Waits for the GPU."""
    own = torch.tensor([len(shapes), crc32(repr(shapes).encode())], device=device)
    if (all_gather(own, group).view(-1, 2) != own).any():
        listed = ", ".join(f"{rows} × {positions}" for rows, positions in shapes)
        raise ValueError(
            "ranks that share experts need as many microbatches of the same shapes, and other ranks' differ "
            f"from those of rank {dist.get_rank()}: {listed or 'none'}. Fill rows up with padding."
        )


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_N: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x_N, group)

    @staticmethod
    def backward(ctx: Any, gradient_M: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(gradient_M, ctx.group), None


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_M: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x_M, group)

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None]:
        return all_gather(gradient_N, ctx.group), None
