"""RMSNorm on a GPU, one pass over memory in either direction: Triton kernels.

torch's backward reads inputs and gradients twice, the second time for the gradient of the weight, which takes
longest. Everything between inputs and outputs is fp32. No atomic additions, so results are the same in each
call. The norms of queries and keys are in qk_norm_gpu.py.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable

NUMBERS = 4096
"""Numbers that a program holds at a time, of whole rows."""
STEPS = 8
"""Times that a program of the gradients does this. Each has a row in the sum of the weight's gradient."""


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x […, H] divided by the root of its mean square and multiplied by `weight` [H]."""
    normed: Tensor = _Norm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return normed


def _rows(width: int) -> tuple[int, int]:
    """(rows that a program holds, the smallest power of 2 that is not below their width)."""
    block = triton.next_power_of_2(width)
    return max(1, NUMBERS // block), block


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        count, block = _rows(width)
        rows = x.numel() // width
        _forward[(triton.cdiv(rows, count),)](x, weight, out, rows, width, epsilon, count, block, num_warps=8)
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        width = x.shape[-1]
        count, block = _rows(width)
        rows = x.numel() // width
        programs = triton.cdiv(rows, count * STEPS)
        out = torch.empty_like(x)
        sums = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        _backward[(programs,)](
            gradient.contiguous(),
            x,
            weight,
            out,
            sums,
            rows,
            width,
            ctx.epsilon,
            count,
            block,
            STEPS,
            num_warps=8,
        )
        return out, sums.sum(0).to(weight.dtype), None


@triton.jit  # type: ignore[untyped-decorator]
def _normed(x, place, inside, W: tl.constexpr, EPSILON: tl.constexpr):  # type: ignore[no-untyped-def]
    """(x / √(mean x² + epsilon) [T, B], the factor [T])."""
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, 1) / W + EPSILON)
    return value * factor[:, None], factor


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    x, weight, out, rows, W: tl.constexpr, EPSILON: tl.constexpr, T: tl.constexpr, B: tl.constexpr
):
    row = tl.program_id(0) * T + tl.arange(0, T)
    column = tl.arange(0, B)
    inside = (row < rows)[:, None] & (column < W)[None, :]
    place = row.to(tl.int64)[:, None] * W + column[None, :]
    value, _ = _normed(x, place, inside, W, EPSILON)
    value *= tl.load(weight + column, mask=column < W, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    gradient,
    x,
    weight,
    out,
    sums,
    rows,
    W: tl.constexpr,
    EPSILON: tl.constexpr,
    T: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,
):
    """`sums` [programs, W]: each program's part of the weight's gradient."""
    column = tl.arange(0, B)
    scale = tl.load(weight + column, mask=column < W, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((T, B), tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * T + tl.arange(0, T)
        inside = (row < rows)[:, None] & (column < W)[None, :]
        place = row.to(tl.int64)[:, None] * W + column[None, :]
        value, factor = _normed(x, place, inside, W, EPSILON)
        d = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        total += d * value
        d *= scale
        d = (d - value * (tl.sum(d * value, 1) / W)[:, None]) * factor[:, None]
        tl.store(out + place, d.to(out.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0).to(tl.int64) * W + column, tl.sum(total, 0), mask=column < W)
