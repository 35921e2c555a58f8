"""Norm and rotation of queries and keys of linear projections on a GPU, one pass over memory in either
direction: Triton kernels.

torch takes some thirty kernels for it, forward and backward, and rounds to bf16 between them. Here everything
between the inputs and the outputs is fp32, cosines and sines too, which a program computes once for all heads
of its positions. The definitions, which the CPU computes, are in self_attention.py; those of tensor products
are normed in tensor_product_gpu.py. No atomic additions, so results are the same in each call.
"""

import math
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpmoe.model.sums_gpu import gradients_of_vectors

POSITIONS = 16
"""Positions that a program holds at a time."""
STEPS = 2
"""Times that a program of the gradients does this. Each has a row in the sums of the gradients of weights."""


def norm_and_rotate_projections(
    mixed: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    epsilon: float,
    angle: Tensor | None,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries […, heads, D] and keys […, groups, D], each head divided by the root of its mean square and
    multiplied by its weight [D], then rotated; and the values […, groups, D], a view, as they are.

    `mixed` […, groups, (heads / groups + 2) · D] has of each group its queries, its key and its value;
    nothing is copied apart. `angle` […, 1, D] in fp32: its first half, twice; only the first half is read,
    and has the gradient. None: no rotation. D is a power of 2.
    """
    parts: tuple[Tensor, Tensor, Tensor] = _OfProjections.apply(  # type: ignore[no-untyped-call]
        mixed, query_weight, key_weight, angle, epsilon, heads
    )
    return parts


class _OfProjections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        query_weight: Tensor,
        key_weight: Tensor,
        angle: Tensor | None,
        epsilon: float,
        heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed = mixed.contiguous()
        angle = None if angle is None else angle.contiguous()
        width, (*shape, groups, group) = len(query_weight), mixed.shape
        query, key = (mixed.new_empty(*shape, count, width) for count in (heads, groups))
        positions, share = math.prod(shape), heads // groups
        ctx.save_for_backward(mixed, query_weight, key_weight, angle)
        # of queries and of keys: numbers from a position to the next, and from a group; heads of a group
        layouts = groups * group, group, share, groups * group, group, 1
        ctx.shape = positions, heads, groups, *layouts, width, epsilon, angle is not None
        _forward[(triton.cdiv(positions, POSITIONS),)](
            mixed,
            mixed[..., share * width :],
            query_weight,
            key_weight,
            angle,
            query,
            key,
            *ctx.shape,
            POSITIONS,
            num_warps=4,
        )
        return query, key, mixed.detach()[..., -width:]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor
    ) -> tuple[Tensor | None, ...]:
        mixed, query_weight, key_weight, angle = ctx.saved_tensors
        positions, heads, groups, *_ = ctx.shape
        width = len(query_weight)
        first_key = heads // groups * width
        programs = triton.cdiv(positions, POSITIONS * STEPS)
        grad_mixed = torch.empty_like(mixed)
        sums = torch.empty(programs, 2 * width, dtype=torch.float32, device=mixed.device)
        grad_angle = torch.empty_like(angle) if ctx.needs_input_grad[3] else None
        _backward[(programs,)](
            grad_query.contiguous(),
            grad_key.contiguous(),
            mixed,
            mixed[..., first_key:],
            query_weight,
            key_weight,
            angle,
            grad_mixed,
            grad_mixed[..., first_key:],
            sums,
            grad_angle,
            *ctx.shape,
            grad_angle is not None,
            POSITIONS,
            STEPS,
            num_warps=4,
        )
        grad_mixed[..., -width:].copy_(grad_value)
        return grad_mixed, *gradients_of_vectors((query_weight, key_weight), sums), grad_angle, None, None


@triton.jit  # type: ignore[untyped-decorator]
def cos_and_sin(angle, t, inside, D: tl.constexpr, ROTATES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of positions t [T]: [T, D / 2] each; of the angle 0 without rotation.

    The instructions for them are accurate between −π and π only, so whole turns are taken off first. The
    first part of 2π has so few bits that its products are exact (Cody and Waite's method).
    """
    half = tl.arange(0, D // 2)
    x = tl.zeros((t.shape[0], D // 2), tl.float32)
    if ROTATES:
        x = tl.load(angle + t.to(tl.int64)[:, None] * D + half[None, :], mask=inside, other=0.0)
        turns = tl.floor(x * 0.15915494309189535 + 0.5)
        x = (x - turns * 6.28125) - turns * 0.0019353071795864769
    return tl.cos(x), tl.sin(x)


@triton.jit  # type: ignore[untyped-decorator]
def _normed(x, place, inside, D: tl.constexpr, EPSILON: tl.constexpr):  # type: ignore[no-untyped-def]
    """(first half of x / √(mean x² + epsilon), second half, the factor) of heads [T], without the weight."""
    first = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + place + D // 2, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + EPSILON)
    return first * factor[:, None], second * factor[:, None], factor


@triton.jit  # type: ignore[untyped-decorator]
def _heads(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    t,
    inside,
    cos,
    sin,
    H: tl.constexpr,
    POSITION: tl.constexpr,
    GROUP: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    EPSILON: tl.constexpr,
    ROTATES: tl.constexpr,
):
    half = tl.arange(0, D // 2)
    weight_1 = tl.load(weight + half).to(tl.float32)[None, :]
    weight_2 = tl.load(weight + D // 2 + half).to(tl.float32)[None, :]
    for h in tl.static_range(H):
        place = (t.to(tl.int64) * H + h)[:, None] * D + half[None, :]
        read = (t.to(tl.int64) * POSITION + h // SHARE * GROUP + h % SHARE * D)[:, None] + half[None, :]
        first, second, _ = _normed(x, read, inside, D, EPSILON)
        first *= weight_1
        second *= weight_2
        if ROTATES:
            turned = first * cos - second * sin
            second = second * cos + first * sin
            first = turned
        tl.store(out + place, first.to(out.dtype.element_ty), mask=inside)
        tl.store(out + place + D // 2, second.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    query,
    key,
    query_weight,
    key_weight,
    angle,
    out_query,
    out_key,
    n,
    H: tl.constexpr,
    G: tl.constexpr,
    QUERY_POSITION: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    QUERY_SHARE: tl.constexpr,
    KEY_POSITION: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    KEY_SHARE: tl.constexpr,
    D: tl.constexpr,
    EPSILON: tl.constexpr,
    ROTATES: tl.constexpr,
    T: tl.constexpr,
):
    t = tl.program_id(0) * T + tl.arange(0, T)
    inside = (t < n)[:, None]
    cos, sin = cos_and_sin(angle, t, inside, D, ROTATES)
    _heads(
        query,
        query_weight,
        out_query,
        t,
        inside,
        cos,
        sin,
        H,
        QUERY_POSITION,
        QUERY_GROUP,
        QUERY_SHARE,
        D,
        EPSILON,
        ROTATES,
    )
    _heads(
        key,
        key_weight,
        out_key,
        t,
        inside,
        cos,
        sin,
        G,
        KEY_POSITION,
        KEY_GROUP,
        KEY_SHARE,
        D,
        EPSILON,
        ROTATES,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _gradients_of_heads(  # type: ignore[no-untyped-def]
    gradient,
    x,
    weight,
    out,
    t,
    inside,
    cos,
    sin,
    turn,
    sum_1,
    sum_2,
    H: tl.constexpr,
    POSITION: tl.constexpr,
    GROUP: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    EPSILON: tl.constexpr,
    ROTATES: tl.constexpr,
):
    """(gradient of the angles, of the weight's first half, of its second) [T, D / 2], added to those given.

    With rotated y₁, y₂, the derivative of y₁ by the angle is −y₂ and that of y₂ is y₁. Turned back, as
    gradients d₁ and d₂ of the components n₁ and n₂ before the rotation, that is n₁·d₂ − n₂·d₁.
    """
    half = tl.arange(0, D // 2)
    weight_1 = tl.load(weight + half).to(tl.float32)[None, :]
    weight_2 = tl.load(weight + D // 2 + half).to(tl.float32)[None, :]
    for h in tl.static_range(H):
        place = (t.to(tl.int64) * H + h)[:, None] * D + half[None, :]
        read = (t.to(tl.int64) * POSITION + h // SHARE * GROUP + h % SHARE * D)[:, None] + half[None, :]
        first, second, factor = _normed(x, read, inside, D, EPSILON)
        d_1 = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        d_2 = tl.load(gradient + place + D // 2, mask=inside, other=0.0).to(tl.float32)
        if ROTATES:
            turned = d_1 * cos + d_2 * sin
            d_2 = d_2 * cos - d_1 * sin
            d_1 = turned
            turn += first * weight_1 * d_2 - second * weight_2 * d_1
        sum_1 += d_1 * first
        sum_2 += d_2 * second
        d_1 *= weight_1
        d_2 *= weight_2
        mean = ((tl.sum(d_1 * first, 1) + tl.sum(d_2 * second, 1)) / D)[:, None]
        d_1 = (d_1 - first * mean) * factor[:, None]
        d_2 = (d_2 - second * mean) * factor[:, None]
        tl.store(out + read, d_1.to(out.dtype.element_ty), mask=inside)
        tl.store(out + read + D // 2, d_2.to(out.dtype.element_ty), mask=inside)
    return turn, sum_1, sum_2


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    grad_query,
    grad_key,
    query,
    key,
    query_weight,
    key_weight,
    angle,
    out_query,
    out_key,
    sums,
    grad_angle,
    n,
    H: tl.constexpr,
    G: tl.constexpr,
    QUERY_POSITION: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    QUERY_SHARE: tl.constexpr,
    KEY_POSITION: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    KEY_SHARE: tl.constexpr,
    D: tl.constexpr,
    EPSILON: tl.constexpr,
    ROTATES: tl.constexpr,
    ANGLES: tl.constexpr,
    T: tl.constexpr,
    STEPS: tl.constexpr,
):
    """`sums` [programs, 2, D]: each program's part of the gradients of the queries' and the keys' weight."""
    half = tl.arange(0, D // 2)
    query_1 = tl.zeros((T, D // 2), tl.float32)
    query_2 = tl.zeros((T, D // 2), tl.float32)
    key_1 = tl.zeros((T, D // 2), tl.float32)
    key_2 = tl.zeros((T, D // 2), tl.float32)
    for step in range(STEPS):
        t = (tl.program_id(0) * STEPS + step) * T + tl.arange(0, T)
        inside = (t < n)[:, None]
        cos, sin = cos_and_sin(angle, t, inside, D, ROTATES)
        turn = tl.zeros((T, D // 2), tl.float32)
        turn, query_1, query_2 = _gradients_of_heads(
            grad_query,
            query,
            query_weight,
            out_query,
            t,
            inside,
            cos,
            sin,
            turn,
            query_1,
            query_2,
            H,
            QUERY_POSITION,
            QUERY_GROUP,
            QUERY_SHARE,
            D,
            EPSILON,
            ROTATES,
        )
        turn, key_1, key_2 = _gradients_of_heads(
            grad_key,
            key,
            key_weight,
            out_key,
            t,
            inside,
            cos,
            sin,
            turn,
            key_1,
            key_2,
            G,
            KEY_POSITION,
            KEY_GROUP,
            KEY_SHARE,
            D,
            EPSILON,
            ROTATES,
        )
        if ANGLES:
            place = t.to(tl.int64)[:, None] * D + half[None, :]
            tl.store(grad_angle + place, turn, mask=inside)
            tl.store(grad_angle + place + D // 2, tl.zeros_like(turn), mask=inside)
    row = sums + tl.program_id(0) * 2 * D + half
    tl.store(row, tl.sum(query_1, 0))
    tl.store(row + D // 2, tl.sum(query_2, 0))
    tl.store(row + D, tl.sum(key_1, 0))
    tl.store(row + D + D // 2, tl.sum(key_2, 0))
