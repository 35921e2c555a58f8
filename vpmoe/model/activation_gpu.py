"""Squared ReLU of a sum with a bias on a GPU, one pass over memory in either direction: Triton kernels.

torch takes two kernels forward and four backward, and another pass for the gradient of the bias. What the
routed experts do is in experts_gpu.py. Everything between inputs and outputs is fp32. No atomic additions, so
results are the same in each call.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpmoe.model.sums_gpu import gradient_of_vector

FORWARD = (4, 512, 4)
"""Rows and columns of a program, and its warps."""
BACKWARD = (4, 512, 4, 16)
"""Rows and columns that a program of the gradients holds at a time, its warps, and how often it does. Each
program has a row in the sums of the bias's gradient."""


def squared_relu(x: Tensor, bias: Tensor | None) -> Tensor:
    """max(x + bias, 0)² of x […, W] and a bias [W]."""
    out: Tensor = _SquaredRelu.apply(x, bias)  # type: ignore[no-untyped-call]
    return out


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, bias)
        out = torch.empty_like(x)
        width = x.shape[-1]
        count, columns, warps = FORWARD
        rows = x.numel() // width
        grid = (triton.cdiv(rows, count), triton.cdiv(width, columns))
        _forward[grid](x, bias, out, rows, width, count, columns, num_warps=warps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, bias = ctx.saved_tensors
        out = torch.empty_like(x)
        width = x.shape[-1]
        count, columns, warps, steps = BACKWARD
        rows = x.numel() // width
        programs = triton.cdiv(rows, count * steps)
        sums = None
        if bias is not None:
            sums = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        _backward[(programs, triton.cdiv(width, columns))](
            gradient.contiguous(), x, bias, out, sums, rows, width, count, columns, steps, num_warps=warps
        )
        return out, None if sums is None else gradient_of_vector(bias, sums)


@triton.jit  # type: ignore[untyped-decorator]
def _positive(x, bias, place, column, inside, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """max(x + bias, 0) [T, B]."""
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=column < W, other=0.0).to(tl.float32)[None, :]
    return tl.maximum(value, 0.0)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _forward(x, bias, out, rows, W: tl.constexpr, T: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * T + tl.arange(0, T)
    column = tl.program_id(1) * B + tl.arange(0, B)
    inside = (row < rows)[:, None] & (column < W)[None, :]
    place = row.to(tl.int64)[:, None] * W + column[None, :]
    value = _positive(x, bias, place, column, inside, W)
    tl.store(out + place, (value * value).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    gradient,
    x,
    bias,
    out,
    sums,
    rows,
    W: tl.constexpr,
    T: tl.constexpr,
    B: tl.constexpr,
    STEPS: tl.constexpr,
):
    """`sums` [programs, W]: the sum over each program's rows."""
    column = tl.program_id(1) * B + tl.arange(0, B)
    total = tl.zeros((T, B), tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * T + tl.arange(0, T)
        inside = (row < rows)[:, None] & (column < W)[None, :]
        place = row.to(tl.int64)[:, None] * W + column[None, :]
        d = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        d *= 2 * _positive(x, bias, place, column, inside, W)
        tl.store(out + place, d.to(out.dtype.element_ty), mask=inside)
        total += d
    if sums is not None:
        tl.store(sums + tl.program_id(0).to(tl.int64) * W + column, tl.sum(total, 0), mask=column < W)
