"""Attention of one query a sequence over vLLM's paged key-value cache: a Triton kernel for steps that decode
many sequences.

A program computes a sequence's queries of one group, which share keys and values, and reads only the keys of
the window. vLLM's kernel for the same takes blocks of 16 positions at a time. With few sequences this one
would leave most of the GPU idle: vLLM's then splits a sequence's keys among programs.
"""

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

BUSY = 256
"""Sequences from which on a program reads 32 positions at a time instead of 128: then other programs hide the
wait for memory, and small programs leave room for more of them."""


def decode_attention(
    query_NhD: Tensor,
    cache: Tensor,
    blocks_NB: Tensor,
    length_N: Tensor,
    *,
    scale: float,
    window: int | None,
    slope_h: Tensor | None,
    offset_h: Tensor | None,
    out: Tensor,
) -> None:
    """Write the attention of each sequence's last position into `out` [N, h, D].

    `cache`: [blocks, groups, block, 2 · D], keys beside values. `blocks_NB`: the blocks of a sequence's
    positions, int32. `length_N`: a sequence's positions, the query's included, int32; 0 gives zeros.
    `window`: a query sees this many positions, its own included; None: all. `slope_h`: ALiBi, fp32.
    `offset_h`: logit of the additional term of the softmax's denominator. D and `block` are powers of 2.
    """
    sequences, heads, width = query_NhD.shape
    groups, block = cache.shape[1:3]
    many = sequences >= BUSY
    _decode[(sequences, groups)](
        query_NhD,
        cache,
        blocks_NB,
        length_N,
        slope_h,
        offset_h,
        out,
        scale,
        query_NhD.stride(0),
        out.stride(0),
        blocks_NB.stride(0),
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        heads // groups,
        max(triton.next_power_of_2(heads // groups), 16),
        width,
        block,
        32 if many else 128,
        window or 0,
        slope_h is not None,
        offset_h is not None,
        num_warps=2 if many else 4,
        num_stages=2 if many else 3,
    )


@triton.jit(do_not_specialize=["blocks_stride"])  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    query,
    cache,
    blocks,
    lengths,
    slopes,
    offsets,
    out,
    scale,
    query_stride,
    out_stride,
    blocks_stride,
    cache_block,
    cache_group,
    cache_position,
    HEADS: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    T: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIBI: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """HEADS: of a group. M: rows of its tile, HEADS and padding."""
    n = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    row = tl.arange(0, M)
    own = row < HEADS
    head = g * HEADS + row
    d = tl.arange(0, D)
    t = tl.arange(0, T)
    length = tl.load(lengths + n)
    q = tl.load(query + n * query_stride + head[:, None] * D + d[None, :], mask=own[:, None], other=0.0)
    if OFFSET:
        top = tl.load(offsets + head, mask=own, other=0.0).to(tl.float32)
        total = tl.full((M,), 1.0, tl.float32)
    else:
        top = tl.full((M,), -1e30, tl.float32)
        total = tl.zeros((M,), tl.float32)
    if ALIBI:
        slope = tl.load(slopes + head, mask=own, other=0.0)
    sums = tl.zeros((M, D), tl.float32)
    first = 0
    if WINDOW:
        first = tl.maximum(length - WINDOW, 0)
    for start in range(first // T * T, length, T):
        position = start + t
        inside = (position >= first) & (position < length)
        block = tl.load(blocks + n * blocks_stride + position // BLOCK, mask=inside, other=0).to(tl.int64)
        place = cache + block * cache_block + g * cache_group + (position % BLOCK) * cache_position
        key = tl.load(place[None, :] + d[:, None], mask=inside[None, :], other=0.0)
        score = tl.dot(q, key, input_precision="ieee") * scale
        if ALIBI:
            score += slope[:, None] * (position - (length - 1))[None, :].to(tl.float32)
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(weight, 1)
        value = tl.load(place[:, None] + D + d[None, :], mask=inside[:, None], other=0.0)
        sums = tl.dot(weight.to(value.dtype), value, sums * fade[:, None], input_precision="ieee")
        top = higher
    result = sums / tl.maximum(total, 1e-30)[:, None]
    place = out + n * out_stride + head[:, None] * D + d[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=own[:, None])
