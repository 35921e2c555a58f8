"""A local layer's queries, keys and values on a GPU, from the factors of its tensor products to what
attention reads, one pass over memory in either direction: Triton kernels.

Product, bias, norm, rotation and the mixture with the first layer's values are one kernel, so that nothing
between them is written, rounded or kept: the backward computes it again from the factors, which are smaller.
The definitions, which the CPU computes, are in tensor_product.py and self_attention.py. Everything between
inputs and outputs is fp32. No atomic additions, so results are the same in each call.

Heads are a loop of the kernel, not unrolled: a pass of Triton's (coalescing) takes time with the cube of the
operations, 11 s for the gradients of eight unrolled heads, and 1 s for the loop, with as many registers.
"""

from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpmoe.model.qk_norm_gpu import cos_and_sin
from vpmoe.model.self_attention_gpu import gradient_of_mix, plus_rounded, sum_of_gradients
from vpmoe.model.sums_gpu import gradients_of_vectors

FORWARD = (8, 4)
"""Positions of a program, and its warps."""
BACKWARD = (2, 1, 16)
"""Positions that a program of the gradients holds at a time, its warps, and how often it does. Each program
has a row in the sums of the gradients of vectors."""


class Heads(NamedTuple):
    """How many there are of what in a tensor product. The width is a power of 2."""

    heads: int
    groups: int
    query_rank: int
    rank: int
    """Of keys and of values."""
    width: int


def projections(
    factors: Tensor,
    bias: Tensor | None,
    query_weight: Tensor,
    key_weight: Tensor,
    epsilon: float,
    angle: Tensor,
    heads: Heads,
    first_value: Tensor | None,
    value_mix: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries […, heads, D], keys and values […, groups, D] of `factors` […, F] as in tensor_product.py, plus
    `bias`, flat: that of queries, keys, values.

    Queries and keys are then normed and rotated as by qk_norm_gpu.norm_and_rotate_projections; `angle`
    […, 1, D] as there. Values are mixed with `first_value` as by self_attention.mix_values; without it and
    `value_mix` they are not.
    """
    parts: tuple[Tensor, Tensor, Tensor] = _Projections.apply(  # type: ignore[no-untyped-call]
        factors, bias, query_weight, key_weight, angle, first_value, value_mix, epsilon, heads
    )
    return parts


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        factors: Tensor,
        bias: Tensor | None,
        query_weight: Tensor,
        key_weight: Tensor,
        angle: Tensor,
        first_value: Tensor | None,
        value_mix: Tensor | None,
        epsilon: float,
        heads: Heads,
    ) -> tuple[Tensor, Tensor, Tensor]:
        factors, angle = factors.contiguous(), angle.contiguous()
        first_value = None if first_value is None else first_value.contiguous()
        inputs = factors, bias, query_weight, key_weight, angle, first_value, value_mix
        positions = factors.numel() // factors.shape[-1]
        query, key, value = (
            factors.new_empty(*factors.shape[:-1], count, heads.width)
            for count in (heads.heads, heads.groups, heads.groups)
        )
        block, warps = FORWARD
        _forward[(triton.cdiv(positions, block),)](
            *inputs,
            query,
            key,
            value,
            positions,
            factors.shape[-1],
            *heads,
            epsilon,
            block,
            num_warps=warps,
        )
        ctx.save_for_backward(*inputs)
        ctx.epsilon, ctx.heads = epsilon, heads
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor
    ) -> tuple[Tensor | None, ...]:
        factors, bias, query_weight, key_weight, angle, first_value, value_mix = inputs = ctx.saved_tensors
        heads: Heads = ctx.heads
        positions = factors.numel() // factors.shape[-1]
        block, warps, steps = BACKWARD
        programs = triton.cdiv(positions, block * steps)
        grad_factors = torch.empty_like(factors)
        grad_first, add_first = (None, False) if first_value is None else sum_of_gradients(first_value)
        grad_angle, add_angle = sum_of_gradients(angle) if ctx.needs_input_grad[4] else (None, False)
        width = heads.width
        biases = 0 if bias is None else len(bias)
        sums = torch.empty(programs, biases + 2 * width, dtype=torch.float32, device=factors.device)
        mix_sums = None if value_mix is None else sums.new_empty(programs)
        _backward[(programs,)](
            grad_query.contiguous(),
            grad_key.contiguous(),
            grad_value.contiguous(),
            *inputs,
            grad_factors,
            grad_first,
            grad_angle,
            sums,
            mix_sums,
            positions,
            factors.shape[-1],
            *heads,
            ctx.epsilon,
            biases,
            add_first,
            add_angle,
            block,
            steps,
            num_warps=warps,
        )
        vectors = (query_weight, key_weight) if bias is None else (bias, query_weight, key_weight)
        *of_bias, of_query, of_key = gradients_of_vectors(vectors, sums)
        return (
            grad_factors,
            of_bias[0] if of_bias else None,
            of_query,
            of_key,
            grad_angle,
            grad_first,
            None if mix_sums is None else gradient_of_mix(value_mix, mix_sums),
            None,
            None,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _halves(x, place, inside, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers at `place` [T] and after it: [T, D / 2] and the D / 2 after these, as they are stored."""
    start = place[:, None] + tl.arange(0, D // 2)[None, :]
    return (
        tl.load(x + start, mask=inside[:, None], other=0.0),
        tl.load(x + start + D // 2, mask=inside[:, None], other=0.0),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _store_halves(x, place, inside, first, second, D: tl.constexpr):  # type: ignore[no-untyped-def]
    start = place[:, None] + tl.arange(0, D // 2)[None, :]
    tl.store(x + start, first.to(x.dtype.element_ty), mask=inside[:, None])
    tl.store(x + start + D // 2, second.to(x.dtype.element_ty), mask=inside[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _vectors(factors, place, inside, R: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """The halves of R vectors, one vector after the other."""
    found = _halves(factors, place, inside, D)
    for r in tl.static_range(1, R):
        found = found + _halves(factors, place + r * D, inside, D)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    factors, place, inside, vectors, bias, head, R: tl.constexpr, D: tl.constexpr
):
    """The halves of a head of a part whose mixtures begin at `place` [T]. `bias`: of the part."""
    first = tl.zeros((place.shape[0], D // 2), tl.float32)
    second = tl.zeros((place.shape[0], D // 2), tl.float32)
    for r in tl.static_range(R):
        a = tl.load(factors + place + (head * R + r), mask=inside, other=0.0).to(tl.float32)[:, None]
        first += a * vectors[2 * r].to(tl.float32)
        second += a * vectors[2 * r + 1].to(tl.float32)
    first *= 1.0 / R
    second *= 1.0 / R
    if bias is not None:
        half = tl.arange(0, D // 2)
        first += tl.load(bias + head * D + half).to(tl.float32)[None, :]
        second += tl.load(bias + head * D + D // 2 + half).to(tl.float32)[None, :]
    return first, second


@triton.jit  # type: ignore[untyped-decorator]
def _weight(weight, D: tl.constexpr):  # type: ignore[no-untyped-def]
    half = tl.arange(0, D // 2)
    return (
        tl.load(weight + half).to(tl.float32)[None, :],
        tl.load(weight + D // 2 + half).to(tl.float32)[None, :],
    )


@triton.jit  # type: ignore[untyped-decorator]
def _factor(first, second, D: tl.constexpr, EPSILON: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 / √(mean square + epsilon) [T, 1]."""
    return tl.rsqrt(tl.sum(first * first + second * second, 1) / D + EPSILON)[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def _heads(  # type: ignore[no-untyped-def]
    factors,
    place,
    t,
    inside,
    bias,
    weight,
    cos,
    sin,
    out,
    H: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Stores queries or keys, whose mixtures begin at `place` [T]."""
    vectors = _vectors(factors, place + H * R, inside, R, D)
    weight_1, weight_2 = _weight(weight, D)
    for h in range(H):
        first, second = _product(factors, place, inside, vectors, bias, h, R, D)
        factor = _factor(first, second, D, EPSILON)
        first = first * factor * weight_1
        second = second * factor * weight_2
        to = t.to(tl.int64) * (H * D) + h * D
        _store_halves(out, to, inside, first * cos - second * sin, second * cos + first * sin, D)


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    factors,
    bias,
    query_weight,
    key_weight,
    angle,
    first_value,
    value_mix,
    query,
    key,
    value,
    n,
    F: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    QR: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    EPSILON: tl.constexpr,
    T: tl.constexpr,
):
    t = tl.program_id(0) * T + tl.arange(0, T)
    inside = t < n
    cos, sin = cos_and_sin(angle, t, inside[:, None], D, True)
    place = t.to(tl.int64) * F
    _heads(factors, place, t, inside, bias, query_weight, cos, sin, query, H, QR, D, EPSILON)
    place += QR * (H + D)
    if bias is not None:
        bias += H * D
    _heads(factors, place, t, inside, bias, key_weight, cos, sin, key, G, R, D, EPSILON)
    place += R * (G + D)
    if bias is not None:
        bias += G * D
    vectors = _vectors(factors, place + G * R, inside, R, D)
    for h in range(G):
        first, second = _product(factors, place, inside, vectors, bias, h, R, D)
        to = t.to(tl.int64) * (G * D) + h * D
        if first_value is not None:
            share = tl.sigmoid(tl.load(value_mix))
            other_1, other_2 = _halves(first_value, to, inside, D)
            first = share * first + (1 - share) * other_1.to(tl.float32)
            second = share * second + (1 - share) * other_2.to(tl.float32)
        _store_halves(value, to, inside, first, second, D)


@triton.jit  # type: ignore[untyped-decorator]
def _add_to_row(sums, first, second, step, D: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add the sums over positions to a program's own D numbers, which the first step stores."""
    place = sums + tl.arange(0, D // 2)
    first = tl.sum(first, 0)
    second = tl.sum(second, 0)
    if STEPS > 1:
        first += tl.load(place, mask=(step > 0) & (tl.arange(0, D // 2) >= 0), other=0.0)
        second += tl.load(place + D // 2, mask=(step > 0) & (tl.arange(0, D // 2) >= 0), other=0.0)
    tl.store(place, first)
    tl.store(place + D // 2, second)


@triton.jit  # type: ignore[untyped-decorator]
def _to_factors(  # type: ignore[no-untyped-def]
    first,
    second,
    factors,
    grad_factors,
    place,
    inside,
    vectors,
    by_vectors,
    head,
    R: tl.constexpr,
):
    """From the gradient of a head's product stores those of its mixtures; those of the vectors [T, D / 2] are
    added to `by_vectors`, without the division by R."""
    found = by_vectors
    for r in tl.static_range(R):
        at = place + (head * R + r)
        a = tl.load(factors + at, mask=inside, other=0.0).to(tl.float32)[:, None]
        found = found[2:] + (found[0] + a * first, found[1] + a * second)  # noqa: RUF005  # Triton has no *
        by_a = tl.sum(vectors[2 * r].to(tl.float32) * first + vectors[2 * r + 1].to(tl.float32) * second, 1)
        tl.store(grad_factors + at, (by_a * (1.0 / R)).to(grad_factors.dtype.element_ty), mask=inside)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _zeros(R: tl.constexpr, T: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    found = (tl.zeros((T, D // 2), tl.float32), tl.zeros((T, D // 2), tl.float32))
    for _ in tl.static_range(1, R):
        more = (tl.zeros((T, D // 2), tl.float32), tl.zeros((T, D // 2), tl.float32))
        found = found + more  # type: ignore[assignment]
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _store_vectors(  # type: ignore[no-untyped-def]
    grad_factors, place, inside, by_vectors, R: tl.constexpr, D: tl.constexpr
):
    for r in tl.static_range(R):
        _store_halves(
            grad_factors,
            place + r * D,
            inside,
            by_vectors[2 * r] * (1.0 / R),
            by_vectors[2 * r + 1] * (1.0 / R),
            D,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _gradients_of_heads(  # type: ignore[no-untyped-def]
    gradient,
    factors,
    grad_factors,
    place,
    t,
    inside,
    bias,
    weight,
    cos,
    sin,
    turn,
    bias_sums,
    weight_sums,
    step,
    H: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    EPSILON: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Of queries or keys, as qk_norm_gpu._gradients_of_heads; the gradient of the angles [T, D / 2] is added
    to `turn` and returned."""
    vectors = _vectors(factors, place + H * R, inside, R, D)
    by_vectors = _zeros(R, place.shape[0], D)
    weight_1, weight_2 = _weight(weight, D)
    sum_1 = tl.zeros((place.shape[0], D // 2), tl.float32)
    sum_2 = tl.zeros((place.shape[0], D // 2), tl.float32)
    for h in range(H):
        d_1, d_2 = _halves(gradient, t.to(tl.int64) * (H * D) + h * D, inside, D)
        d_1 = d_1.to(tl.float32)
        d_2 = d_2.to(tl.float32)
        first, second = _product(factors, place, inside, vectors, bias, h, R, D)
        factor = _factor(first, second, D, EPSILON)
        first *= factor
        second *= factor
        turned = d_1 * cos + d_2 * sin
        d_2 = d_2 * cos - d_1 * sin
        d_1 = turned
        turn += first * weight_1 * d_2 - second * weight_2 * d_1
        sum_1 += d_1 * first
        sum_2 += d_2 * second
        d_1 *= weight_1
        d_2 *= weight_2
        mean = (tl.sum(d_1 * first + d_2 * second, 1) / D)[:, None]
        d_1 = (d_1 - first * mean) * factor
        d_2 = (d_2 - second * mean) * factor
        if bias is not None:
            _add_to_row(bias_sums + h * D, d_1, d_2, step, D, STEPS)
        by_vectors = _to_factors(d_1, d_2, factors, grad_factors, place, inside, vectors, by_vectors, h, R)
    _store_vectors(grad_factors, place + H * R, inside, by_vectors, R, D)
    _add_to_row(weight_sums, sum_1, sum_2, step, D, STEPS)
    return turn


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    grad_query,
    grad_key,
    grad_value,
    factors,
    bias,
    query_weight,
    key_weight,
    angle,
    first_value,
    value_mix,
    grad_factors,
    grad_first,
    grad_angle,
    sums,
    mix_sums,
    n,
    F: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    QR: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    EPSILON: tl.constexpr,
    BIASES: tl.constexpr,
    ADD_FIRST: tl.constexpr,
    ADD_ANGLE: tl.constexpr,
    T: tl.constexpr,
    STEPS: tl.constexpr,
):
    """`sums` [programs, BIASES + 2 · D]: each program's part of the gradients of the bias, if there is one,
    and of the queries' and the keys' weight. `mix_sums` [programs]: of λ. ADD_…: to the gradients there."""
    sums += tl.program_id(0).to(tl.int64) * (BIASES + 2 * D)
    mixed = 0.0
    key_bias = None if bias is None else bias + H * D
    value_bias = None if bias is None else bias + (H + G) * D
    for step in range(STEPS):
        t = (tl.program_id(0) * STEPS + step) * T + tl.arange(0, T)
        inside = t < n
        cos, sin = cos_and_sin(angle, t, inside[:, None], D, True)
        turn = tl.zeros((T, D // 2), tl.float32)
        place = t.to(tl.int64) * F
        turn = _gradients_of_heads(
            grad_query,
            factors,
            grad_factors,
            place,
            t,
            inside,
            bias,
            query_weight,
            cos,
            sin,
            turn,
            sums,
            sums + BIASES,
            step,
            H,
            QR,
            D,
            EPSILON,
            STEPS,
        )
        place += QR * (H + D)
        turn = _gradients_of_heads(
            grad_key,
            factors,
            grad_factors,
            place,
            t,
            inside,
            key_bias,
            key_weight,
            cos,
            sin,
            turn,
            sums + H * D,
            sums + BIASES + D,
            step,
            G,
            R,
            D,
            EPSILON,
            STEPS,
        )
        if grad_angle is not None:
            at = t.to(tl.int64) * D
            if ADD_ANGLE:  # the other half is 0
                beside = at[:, None] + tl.arange(0, D // 2)[None, :]
                turn += tl.load(grad_angle + beside, mask=inside[:, None], other=0.0)
                tl.store(grad_angle + beside, turn, mask=inside[:, None])
            else:
                _store_halves(grad_angle, at, inside, turn, tl.zeros_like(turn), D)
        place += R * (G + D)
        vectors = _vectors(factors, place + G * R, inside, R, D)
        by_vectors = _zeros(R, T, D)
        for h in range(G):
            at = t.to(tl.int64) * (G * D) + h * D
            d_1, d_2 = _halves(grad_value, at, inside, D)
            d_1 = d_1.to(tl.float32)
            d_2 = d_2.to(tl.float32)
            if first_value is not None:
                share = tl.sigmoid(tl.load(value_mix))
                first, second = _product(factors, place, inside, vectors, value_bias, h, R, D)
                other_1, other_2 = _halves(first_value, at, inside, D)
                by_mix = d_1 * (first - other_1.to(tl.float32)) + d_2 * (second - other_2.to(tl.float32))
                mixed += tl.sum(tl.sum(by_mix, 1), 0)
                by_first_1 = (1 - share) * d_1
                by_first_2 = (1 - share) * d_2
                if ADD_FIRST:
                    before_1, before_2 = _halves(grad_first, at, inside, D)
                    by_first_1 = plus_rounded(before_1, by_first_1)
                    by_first_2 = plus_rounded(before_2, by_first_2)
                _store_halves(grad_first, at, inside, by_first_1, by_first_2, D)
                d_1 *= share
                d_2 *= share
            if bias is not None:
                _add_to_row(sums + (H + G + h) * D, d_1, d_2, step, D, STEPS)
            by_vectors = _to_factors(
                d_1, d_2, factors, grad_factors, place, inside, vectors, by_vectors, h, R
            )
        _store_vectors(grad_factors, place + G * R, inside, by_vectors, R, D)
        if STEPS > 1:
            tl.debug_barrier()  # the next step's threads read the sums that other threads of this one stored
    if mix_sums is not None:
        tl.store(mix_sums + tl.program_id(0), mixed)
