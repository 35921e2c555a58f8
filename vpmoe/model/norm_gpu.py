"""Sums of the residual stream and their RMSNorm on a GPU, one pass over memory in either direction: Triton
kernels.

torch's backward reads inputs and gradients twice, the second time for the gradient of the weight, which takes
longest; autograd adds up the gradients of a tensor that is read several times in one pass for each. Here a
pass computes a sum and its norm, and in the backward the gradients of all readers of the norm, and the one
that comes along the stream, are added where they are read. Everything between inputs and outputs is fp32, so
that a sum is rounded once. No atomic additions, so results are the same in each call. The norms of queries
and keys are in qk_norm_gpu.py.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpmoe.model.sums_gpu import gradient_of_vector

FORWARD = (4096, 8)
"""Numbers that a program of a norm holds, of whole rows, and its warps."""
BACKWARD = (1024, 4, 32)
"""The same of a norm's gradients, and the times that a program does this. Each program has a row in the sum
of the weight's gradient."""
READERS = 3
"""Most readers of a norm."""
TOTAL = (2048, 4)
"""Numbers of a program of `total_of`, and its warps."""


def sum_and_norm(
    addends: tuple[Tensor, ...], weight: Tensor, epsilon: float, readers: int
) -> tuple[Tensor, ...]:
    """(the sum of one or two addends […, H], then `readers` times the sum divided by the root of its mean
    square and multiplied by `weight` [H]).

    The norms are tensors of the same memory: each reader takes one, and its gradient comes apart from the
    others'. Nothing may change them in place. Raises ValueError for more than READERS, or other numbers of
    addends.
    """
    if len(addends) not in (1, 2) or not 1 <= readers <= READERS:
        raise ValueError(
            f"{len(addends)} addends and {readers} readers of a norm; it takes one or two addends and "
            f"up to {READERS} readers. Add others with total_of; let readers share a tensor."
        )
    x, added = (*addends, None)[:2]
    found: tuple[Tensor, ...] = _SumAndNorm.apply(x, added, weight, epsilon, readers)  # type: ignore[no-untyped-call]
    return found


def total_of(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """The sum of three tensors of one shape."""
    total: Tensor = _TotalOf.apply(first, second, third)  # type: ignore[no-untyped-call]
    return total


def _rows(width: int, numbers: int) -> tuple[int, int]:
    """(rows that a program of `numbers` holds, the smallest power of 2 that is not below their width)."""
    block = triton.next_power_of_2(width)
    return max(1, numbers // block), block


class _SumAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, epsilon: float, readers: int
    ) -> tuple[Tensor, ...]:
        x = x.contiguous()
        added = None if added is None else added.contiguous()
        out = torch.empty_like(x)
        total = x.detach() if added is None else torch.empty_like(x)
        width = x.shape[-1]
        numbers, warps = FORWARD
        count, block = _rows(width, numbers)
        rows = x.numel() // width
        _forward[(triton.cdiv(rows, count),)](
            x, added, weight, total, out, rows, width, epsilon, count, block, num_warps=warps
        )
        ctx.save_for_backward(total, weight)
        ctx.epsilon, ctx.addends = epsilon, 1 if added is None else 2
        ctx.set_materialize_grads(False)
        return total, out, *(out.detach() for _ in range(readers - 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along: Tensor | None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        width = total.shape[-1]
        numbers, warps, steps = BACKWARD
        count, block = _rows(width, numbers)
        rows = total.numel() // width
        programs = triton.cdiv(rows, count * steps)
        out = torch.empty_like(total)
        sums = torch.empty(programs, width, dtype=torch.float32, device=total.device)
        found = [x.contiguous() for x in gradients if x is not None]
        _backward[(programs,)](
            None if along is None else along.contiguous(),
            *(found + [None] * READERS)[:READERS],
            total,
            weight,
            out,
            sums,
            rows,
            width,
            ctx.epsilon,
            count,
            block,
            steps,
            num_warps=warps,
        )
        grad_added = out if ctx.addends == 2 else None
        return out, grad_added, gradient_of_vector(weight, sums), None, None


class _TotalOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        first, second, third = (x.contiguous() for x in (first, second, third))
        out = torch.empty_like(first)
        numbers, warps = TOTAL
        _total[(triton.cdiv(out.numel(), numbers),)](
            first, second, third, out, out.numel(), numbers, num_warps=warps
        )
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gradient, gradient, gradient


@triton.jit
def _loaded(x, place, inside):  # type: ignore[no-untyped-def]
    return tl.load(x + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _normed(value, W: tl.constexpr, EPSILON: tl.constexpr):  # type: ignore[no-untyped-def]
    """(value / √(mean value² + epsilon) [T, B], the factor [T])."""
    factor = tl.rsqrt(tl.sum(value * value, 1) / W + EPSILON)
    return value * factor[:, None], factor


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    x,
    added,
    weight,
    total,
    out,
    rows,
    W: tl.constexpr,
    EPSILON: tl.constexpr,
    T: tl.constexpr,
    B: tl.constexpr,
):
    """Stores the sum only if something is added."""
    row = tl.program_id(0) * T + tl.arange(0, T)
    column = tl.arange(0, B)
    inside = (row < rows)[:, None] & (column < W)[None, :]
    place = row.to(tl.int64)[:, None] * W + column[None, :]
    value = _loaded(x, place, inside)
    if added is not None:
        rounded = (value + _loaded(added, place, inside)).to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=inside)
        value = rounded.to(tl.float32)  # what the backward reads
    value, _ = _normed(value, W, EPSILON)
    value *= tl.load(weight + column, mask=column < W, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    along,
    gradient_1,
    gradient_2,
    gradient_3,
    total,
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
    """`along`: the gradient of the sum by what comes after it in the stream. It and the readers' may be None.
    `sums` [programs, W]: each program's part of the weight's gradient."""
    column = tl.arange(0, B)
    scale = tl.load(weight + column, mask=column < W, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros((T, B), tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * T + tl.arange(0, T)
        inside = (row < rows)[:, None] & (column < W)[None, :]
        place = row.to(tl.int64)[:, None] * W + column[None, :]
        value, factor = _normed(_loaded(total, place, inside), W, EPSILON)
        d = tl.zeros((T, B), tl.float32)
        if gradient_1 is not None:
            d += _loaded(gradient_1, place, inside)
        if gradient_2 is not None:
            d += _loaded(gradient_2, place, inside)
        if gradient_3 is not None:
            d += _loaded(gradient_3, place, inside)
        of_weight += d * value
        d *= scale
        d = (d - value * (tl.sum(d * value, 1) / W)[:, None]) * factor[:, None]
        if along is not None:
            d += _loaded(along, place, inside)
        tl.store(out + place, d.to(out.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0).to(tl.int64) * W + column, tl.sum(of_weight, 0), mask=column < W)


@triton.jit  # type: ignore[untyped-decorator]  # n is a multiple of 16, so a thread loads 16 bytes at a time
def _total(first, second, third, out, n, B: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = place < n
    value = _loaded(first, place, inside) + _loaded(second, place, inside) + _loaded(third, place, inside)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
