"""Tensor products and mixed values on a GPU, each one pass over memory in either direction: Triton kernels.

torch computes a tensor product as one small matrix product a position (8 × 4 by 4 × 128), and mixes values in
fp32 tensors; both take ten times as long as reading and writing their bf16 inputs and outputs. The
definitions are tensor_product.py and self_attention.py, which the CPU computes. Sums are in fp32. No atomic
additions, so results are the same in each call.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpmoe.model.main_gradient import add_to_main_gradient
from vpmoe.model.sums_gpu import gradient_of_vector

POSITIONS = 8
"""Positions of a program of the tensor products."""
NUMBERS = 4096
"""Numbers of a program that mixes values."""
SUMS = 1024
"""Sums that the last kernel of a gradient of λ adds at a time."""


def tensor_product(
    factors: Tensor, bias: Tensor | None, heads: int, groups: int, width: int, ranks: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """tensor_product.tensor_product, plus `bias`, flat: that of queries, keys, values. `width` is a power of
    2."""
    parts: tuple[Tensor, Tensor, Tensor] = _TensorProduct.apply(  # type: ignore[no-untyped-call]
        factors, bias, ((heads, ranks[0]), (groups, ranks[1]), (groups, ranks[1])), width
    )
    return parts


def mix_values(value: Tensor, first_value: Tensor, value_mix: Tensor) -> Tensor:
    """self_attention.mix_values."""
    mixed: Tensor = _MixValues.apply(value, first_value, value_mix)  # type: ignore[no-untyped-call]
    return mixed


class _TensorProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, factors: Tensor, bias: Tensor | None, parts: tuple[tuple[int, int], ...], width: int
    ) -> tuple[Tensor, ...]:
        factors = factors.contiguous()
        ctx.save_for_backward(factors, bias)
        ctx.parts, ctx.width = parts, width
        positions = factors.numel() // factors.shape[-1]
        outs = []
        first = first_bias = 0
        for count, rank in parts:
            out = factors.new_empty(*factors.shape[:-1], count, width)
            _products[(triton.cdiv(positions, POSITIONS),)](
                factors,
                None if bias is None else bias[first_bias:],
                out,
                positions,
                first,
                factors.shape[-1],
                count,
                rank,
                width,
                bias is not None,
                POSITIONS,
            )
            outs.append(out)
            first += rank * (count + width)
            first_bias += count * width
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        factors, bias = ctx.saved_tensors
        positions = factors.numel() // factors.shape[-1]
        programs = triton.cdiv(positions, POSITIONS)
        grad_factors = torch.empty_like(factors)
        sums = None
        if bias is not None:
            sums = torch.empty(programs, len(bias), dtype=torch.float32, device=bias.device)
        first = first_bias = 0
        for (count, rank), gradient in zip(ctx.parts, gradients, strict=True):
            gradient = gradient.contiguous()
            _gradients_of_factors[(programs,)](
                factors,
                gradient,
                grad_factors,
                None if sums is None else sums[:, first_bias:],
                0 if sums is None else sums.shape[1],
                positions,
                first,
                factors.shape[-1],
                count,
                rank,
                ctx.width,
                sums is not None,
                POSITIONS,
            )
            first += rank * (count + ctx.width)
            first_bias += count * ctx.width
        grad_bias = None if sums is None else gradient_of_vector(bias, sums)
        return grad_factors, grad_bias, None, None


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _products(  # type: ignore[no-untyped-def]
    factors,
    bias,
    out,
    n,
    FIRST: tl.constexpr,
    F: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BIASED: tl.constexpr,
    T: tl.constexpr,
):
    """`FIRST`: where the H · R mixtures of a position's F factors begin; the R vectors follow them."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    inside = t < n
    inner = tl.arange(0, D)
    row = factors + t.to(tl.int64) * F + FIRST
    for h in tl.static_range(H):
        acc = tl.zeros((T, D), tl.float32)
        for r in tl.static_range(R):
            a = tl.load(row + h * R + r, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(row[:, None] + (H * R + r * D + inner)[None, :], mask=inside[:, None], other=0.0)
            acc += a[:, None] * b.to(tl.float32)
        acc = acc / R
        if BIASED:
            acc += tl.load(bias + h * D + inner).to(tl.float32)[None, :]
        place = out + (t.to(tl.int64) * H + h)[:, None] * D + inner[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _gradients_of_factors(  # type: ignore[no-untyped-def]
    factors,
    gradient,
    grad_factors,
    sums,
    W: tl.constexpr,
    n,
    FIRST: tl.constexpr,
    F: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BIASED: tl.constexpr,
    T: tl.constexpr,
):
    """`sums` [programs, W]: in H · D columns each program's part of the gradient of the bias."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    inside = t < n
    inner = tl.arange(0, D)
    start = t.to(tl.int64) * F + FIRST
    for r in tl.static_range(R):  # reads the gradients again from the cache, which has room for them
        vector = start[:, None] + (H * R + r * D + inner)[None, :]
        b = tl.load(factors + vector, mask=inside[:, None], other=0.0).to(tl.float32)
        grad_b = tl.zeros((T, D), tl.float32)
        for h in tl.static_range(H):
            place = gradient + (t.to(tl.int64) * H + h)[:, None] * D + inner[None, :]
            g = tl.load(place, mask=inside[:, None], other=0.0).to(tl.float32)
            if BIASED and r == 0:
                tl.store(sums + tl.program_id(0).to(tl.int64) * W + h * D + inner, tl.sum(g, 0))
            a = tl.load(factors + start + h * R + r, mask=inside, other=0.0).to(tl.float32)
            grad_b += a[:, None] * g
            grad_a = tl.sum(b * g, 1) / R
            tl.store(grad_factors + start + h * R + r, grad_a.to(grad_factors.dtype.element_ty), mask=inside)
        tl.store(grad_factors + vector, (grad_b / R).to(grad_factors.dtype.element_ty), mask=inside[:, None])


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
        grad_value, grad_first = torch.empty_like(first_value), torch.empty_like(first_value)
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
            NUMBERS,
            num_warps=8,
        )

        def gradient_of_mix(out: Tensor, *, add: bool) -> None:
            _gradient_of_mix[(1,)](sums, value_mix, out, programs, add, SUMS, num_warps=4)

        grad_mix = add_to_main_gradient(value_mix, lambda main: gradient_of_mix(main, add=True))
        if grad_mix is None:
            grad_mix = torch.empty_like(value_mix)
            gradient_of_mix(grad_mix, add=False)
        return grad_value, grad_first, grad_mix


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
    tl.store(grad_first + i, ((1 - share) * g).to(grad_first.dtype.element_ty), mask=inside)
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
