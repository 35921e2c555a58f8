"""Mixed values on a GPU, one pass over memory in either direction: Triton kernels.

torch mixes them in fp32 tensors, which takes ten times as long as reading and writing their bf16 inputs and
outputs. The definition is in self_attention.py, which the CPU computes; local layers mix where they make
their values (tensor_product_gpu.py). Sums are in fp32. No atomic additions, so results are the same in each
call.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpmoe.model.main_gradient import add_to_main_gradient, gradient_so_far

NUMBERS = 4096
"""Numbers of a program that mixes values."""
SUMS = 1024
"""Sums that the last kernel of a gradient of λ adds at a time."""


def mix_values(value: Tensor, first_value: Tensor, value_mix: Tensor) -> Tensor:
    """self_attention.mix_values."""
    mixed: Tensor = _MixValues.apply(value, first_value, value_mix)  # type: ignore[no-untyped-call]
    return mixed


class _MixValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, first_value: Tensor, value_mix: Tensor) -> Tensor:
        first_value = first_value.contiguous()
        width = value.shape[-1]
        heads = value.reshape(-1, width)  # a view of values that stand among queries and keys
        ctx.save_for_backward(heads, first_value, value_mix)
        out = torch.empty_like(first_value)
        _mix[(triton.cdiv(out.numel(), NUMBERS),)](
            heads, first_value, value_mix, out, out.numel(), width, heads.stride(0), NUMBERS, num_warps=8
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, first_value, value_mix = ctx.saved_tensors
        programs = triton.cdiv(first_value.numel(), NUMBERS)
        grad_value = torch.empty_like(first_value)
        grad_first, add_first = sum_of_gradients(first_value)
        sums = torch.empty(programs, dtype=torch.float32, device=first_value.device)
        _gradients_of_values[(programs,)](
            gradient.contiguous(),
            heads,
            first_value,
            value_mix,
            grad_value,
            grad_first,
            sums,
            first_value.numel(),
            first_value.shape[-1],
            heads.stride(0),
            add_first,
            NUMBERS,
            num_warps=8,
        )
        return grad_value, grad_first, gradient_of_mix(value_mix, sums)


def sum_of_gradients(x: Tensor) -> tuple[Tensor, bool]:
    """(tensor for the gradient of x, whether it is added to what is there)."""
    total = gradient_so_far(x)
    return (torch.empty_like(x), False) if total is None else (total, True)


def gradient_of_mix(value_mix: Tensor, sums: Tensor) -> Tensor:
    """What a backward returns as the gradient of λ's logit, from the programs' parts of the gradient of λ, in
    fp32. Added to the fp32 buffer if there is one, as in add_to_main_gradient."""

    def run(out: Tensor, *, add: bool) -> None:
        _gradient_of_mix[(1,)](sums, value_mix, out, len(sums), add, SUMS, num_warps=4)

    added = add_to_main_gradient(value_mix, lambda main: run(main, add=True))
    if added is not None:
        return added
    gradient = torch.empty_like(value_mix)
    run(gradient, add=False)
    return gradient


@triton.jit
def plus_rounded(total, own):  # type: ignore[no-untyped-def]
    """total + own, which is rounded before as a tensor of its own would be."""
    return total.to(tl.float32) + own.to(total.dtype).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _mix(  # type: ignore[no-untyped-def]
    value, first_value, value_mix, out, n, D: tl.constexpr, STRIDE: tl.constexpr, B: tl.constexpr
):
    """STRIDE: numbers from a head of `value` to the next."""
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = i < n
    share = tl.sigmoid(tl.load(value_mix))
    own = tl.load(value + i // D * STRIDE + i % D, mask=inside).to(tl.float32)
    first = tl.load(first_value + i, mask=inside).to(tl.float32)
    tl.store(out + i, (share * own + (1 - share) * first).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gradients_of_values(  # type: ignore[no-untyped-def]
    gradient,
    value,
    first_value,
    value_mix,
    grad_value,
    grad_first,
    sums,
    n,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    ADD_FIRST: tl.constexpr,
    B: tl.constexpr,
):
    """Also stores each program's part of the gradient of λ."""
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = i < n
    share = tl.sigmoid(tl.load(value_mix))
    g = tl.load(gradient + i, mask=inside, other=0.0).to(tl.float32)
    own = tl.load(value + i // D * STRIDE + i % D, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(first_value + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_value + i, (share * g).to(grad_value.dtype.element_ty), mask=inside)
    by_first = (1 - share) * g
    if ADD_FIRST:
        by_first = plus_rounded(tl.load(grad_first + i, mask=inside, other=0.0), by_first)
    tl.store(grad_first + i, by_first.to(grad_first.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0), tl.sum(g * (own - first), 0))


@triton.jit(do_not_specialize=["programs"])  # type: ignore[untyped-decorator]
def _gradient_of_mix(  # type: ignore[no-untyped-def]
    sums, value_mix, out, programs, ADD: tl.constexpr, B: tl.constexpr
):
    """From the programs' parts of the gradient of λ, that of its logit, stored or added."""
    total = tl.zeros((B,), tl.float32)
    for first in range(0, programs, B):
        i = first + tl.arange(0, B)
        total += tl.load(sums + i, mask=i < programs, other=0.0)
    share = tl.sigmoid(tl.load(value_mix))
    found = tl.sum(total, 0) * share * (1 - share)
    if ADD:
        found += tl.load(out)
    tl.store(out, found)
