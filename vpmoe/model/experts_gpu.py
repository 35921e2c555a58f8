"""Between the experts' two products on a GPU, one pass over memory in either direction: Triton kernels.

Bias, squared ReLU, the token's weight and the column of weights that carries the second bias through its
product (grouped.grouped_product_with_bias) are some ten of torch's kernels forward and twenty backward, some
of them in fp32. An expert's rows are consecutive, and a few programs share them, so a program adds up the
gradient of its expert's bias in registers. No atomic additions, so results are the same in each call.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpmoe.model.grouped import COLUMN

NUMBERS = 4096
"""Numbers that a program holds at a time, of whole rows."""
SHARES = 8
"""Programs of an expert."""


def activated(inner_nW: Tensor, bias: Tensor | None, weight_n: Tensor, ends_E: Tensor) -> Tensor:
    """[n, W]: squared_relu(x + its expert's bias) · the row's weight.

    With a bias, flat [experts · W], the rows are [n, W + COLUMN]: the weight itself follows, then zeros.
    `ends_E` int32: where the rows of each expert end. Weights are fp32.
    """
    rows: Tensor = _Activated.apply(inner_nW, bias, weight_n, ends_E)  # type: ignore[no-untyped-call]
    return rows


def _tile(width: int) -> tuple[int, int]:
    """(rows that a program holds, the smallest power of 2 that is not below their width)."""
    block = triton.next_power_of_2(width)
    return max(1, NUMBERS // block), block


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner_nW: Tensor, bias: Tensor | None, weight_n: Tensor, ends_E: Tensor) -> Tensor:
        inner_nW, weight_n = inner_nW.contiguous(), weight_n.contiguous()
        rows, width = inner_nW.shape
        out = inner_nW.new_empty(rows, width if bias is None else width + COLUMN)
        _forward[(len(ends_E), SHARES)](
            inner_nW, bias, weight_n, ends_E, out, width, out.shape[1], *_tile(width), SHARES, num_warps=4
        )
        ctx.save_for_backward(inner_nW, bias, weight_n, ends_E)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inner_nW, bias, weight_n, ends_E = ctx.saved_tensors
        gradient = gradient.contiguous()
        width = inner_nW.shape[1]
        grad_inner, grad_weight = torch.empty_like(inner_nW), torch.empty_like(weight_n)
        sums = None
        if bias is not None:
            sums = torch.empty(len(ends_E), SHARES, width, dtype=torch.float32, device=bias.device)
        _backward[(len(ends_E), SHARES)](
            gradient,
            inner_nW,
            bias,
            weight_n,
            ends_E,
            grad_inner,
            grad_weight,
            sums,
            width,
            gradient.shape[1],
            *_tile(width),
            SHARES,
            num_warps=4,
        )
        grad_bias = None if sums is None or bias is None else sums.sum(1).flatten().to(bias.dtype)
        return grad_inner, grad_bias, grad_weight, None


@triton.jit  # type: ignore[untyped-decorator]
def _first_rows(ends, expert, T: tl.constexpr):  # type: ignore[no-untyped-def]
    """(first row of this program's share of an expert, end of the expert's rows)."""
    first = tl.load(ends + tl.maximum(expert - 1, 0))
    return tl.where(expert > 0, first, 0) + tl.program_id(1) * T, tl.load(ends + expert)


@triton.jit  # type: ignore[untyped-decorator]
def _relu(inner, bias, expert, row, inside, W: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """relu(x + bias) [T, B] in fp32; without a bias if it is None."""
    column = tl.arange(0, B)
    x = tl.load(inner + row[:, None] * W + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + expert * W + column, mask=column < W, other=0.0).to(tl.float32)[None, :]
    return tl.maximum(x, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    inner,
    bias,
    weight,
    ends,
    out,
    W: tl.constexpr,
    WIDE: tl.constexpr,
    T: tl.constexpr,
    B: tl.constexpr,
    SHARES: tl.constexpr,
):
    """WIDE: columns of `out`."""
    expert = tl.program_id(0)
    begin, end = _first_rows(ends, expert, T)
    column = tl.arange(0, B)
    for start in range(begin, end, SHARES * T):
        row = start + tl.arange(0, T)
        inside = (row < end)[:, None] & (column < W)[None, :]
        row = row.to(tl.int64)
        x = _relu(inner, bias, expert, row, inside, W, B)
        share = tl.load(weight + row, mask=row < end, other=0.0)
        value = x * x * share[:, None]
        tl.store(out + row[:, None] * WIDE + column[None, :], value.to(out.dtype.element_ty), mask=inside)
        if WIDE > W:
            spare = tl.arange(0, WIDE - W)
            value = tl.where(spare[None, :] == 0, share[:, None], 0.0)
            place = out + row[:, None] * WIDE + (W + spare)[None, :]
            tl.store(place, value.to(out.dtype.element_ty), mask=(row < end)[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    gradient,
    inner,
    bias,
    weight,
    ends,
    grad_inner,
    grad_weight,
    sums,
    W: tl.constexpr,
    WIDE: tl.constexpr,
    T: tl.constexpr,
    B: tl.constexpr,
    SHARES: tl.constexpr,
):
    """`sums` [experts, shares, W]: each program's part of the gradient of the bias."""
    expert = tl.program_id(0)
    begin, end = _first_rows(ends, expert, T)
    column = tl.arange(0, B)
    total = tl.zeros((T, B), tl.float32)
    for start in range(begin, end, SHARES * T):
        row = start + tl.arange(0, T)
        inside = (row < end)[:, None] & (column < W)[None, :]
        row = row.to(tl.int64)
        x = _relu(inner, bias, expert, row, inside, W, B)
        share = tl.load(weight + row, mask=row < end, other=0.0)
        place = gradient + row[:, None] * WIDE + column[None, :]
        d = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        by_share = tl.sum(d * x * x, 1)
        if WIDE > W:
            by_share += tl.load(gradient + row * WIDE + W, mask=row < end, other=0.0).to(tl.float32)
        tl.store(grad_weight + row, by_share, mask=row < end)
        d *= 2 * x * share[:, None]
        total += d
        place = grad_inner + row[:, None] * W + column[None, :]
        tl.store(place, d.to(grad_inner.dtype.element_ty), mask=inside)
    if bias is not None:
        place = sums + (expert * SHARES + tl.program_id(1)) * W + column
        tl.store(place, tl.sum(total, 0), mask=column < W)
