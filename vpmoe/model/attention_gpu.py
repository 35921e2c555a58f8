"""Attention inside documents on a GPU, with an optional window, ALiBi and a softmax offset: Triton kernels.

FlashAttention's method (arXiv 2307.08691): one pass over tiles of keys with a running maximum and sum, and a
backward pass that computes the weights again from the stored log of the sum. Memory is linear in positions.
Tiles cut the packed positions without regard to documents, and a tile reads where the documents of its
positions begin and end. So neither grid nor compiled code depends on the documents' lengths. A tile's rows
are positions × the query heads that share a key-value head: each key is loaded once for all of them, and the
gradient of a key is one sum in registers. No atomic additions, so results are the same in each call.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable

TILES = {
    "forward": ((64, 32, 4, 3), (64, 64, 4, 3)),
    "queries": ((64, 32, 4, 2), (128, 64, 8, 3)),
    "keys": ((32, 64, 4, 3), (64, 64, 4, 2)),
}
"""(rows, keys, warps, stages of loads in flight) of a tile: of the output, of the gradient of queries and of
those of keys and values, each with a window and without. The fastest of about seven on an H200 with 4 query
heads of width 128 a key-value head."""
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
SPAN_BLOCK = 1024
"""Positions of one program of `_spans`."""


def packed_attention(
    query_nhD: Tensor,
    key_ngD: Tensor,
    value_ngD: Tensor,
    boundaries: Tensor,
    *,
    window: int | None,
    slopes_h: Tensor | None,
    offset_h: Tensor | None,
) -> Tensor:
    """[n, heads, width]: Σ_j P_ij v_j inside each run of `boundaries`, with

        P_ij = exp(l_ij) / (exp(offset) + Σ_j exp(l_ij)),  l_ij = q_i·k_j / √width − slope · (i − j),
        i − window < j ≤ i

    bf16 or fp16, sums in fp32. n positions of all runs, one run after the other; `boundaries` [runs + 1]
    int32 from 0 to n. Query head h uses the key-value head h // (heads / groups). `window` counts the query's
    own position. Without `slopes_h` [heads] there is no bias; without `offset_h` [heads] its exp is 0. Both
    are fp32; `slopes_h` has no gradient. Raises ValueError for another dtype, a width that is not 16, 32, 64
    or 128, and a number of query heads a key-value head that is not a power of two up to 32.
    """
    _, heads, width = query_nhD.shape
    share = heads // key_ngD.shape[1]
    if query_nhD.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"queries are {query_nhD.dtype}; attention on a GPU takes bf16 or fp16. Cast them.")
    for name, number, allowed in (
        ("head width", width, (16, 32, 64, 128)),
        ("number of query heads a key-value head", share, (1, 2, 4, 8, 16, 32)),
    ):
        if number not in allowed:
            raise ValueError(f"the {name} is {number}; attention on a GPU takes one of {allowed}.")
    out: Tensor = _PackedAttention.apply(  # type: ignore[no-untyped-call]
        query_nhD, key_ngD, value_ngD, offset_h, boundaries, window, slopes_h
    )
    return out


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_nhD: Tensor,
        key_ngD: Tensor,
        value_ngD: Tensor,
        offset_h: Tensor | None,
        boundaries: Tensor,
        window: int | None,
        slopes_h: Tensor | None,
    ) -> Tensor:
        query, key, value = (x.contiguous() for x in (query_nhD, key_ngD, value_ngD))
        positions, heads, width = query.shape
        groups = key.shape[1]
        runs = len(boundaries) - 1
        spans = torch.empty(2, positions, dtype=torch.int32, device=query.device)
        _spans[(triton.cdiv(positions, SPAN_BLOCK),)](
            boundaries, spans, positions, runs, runs.bit_length(), SPAN_BLOCK
        )
        out = torch.empty_like(query)
        log2_sum_nh = torch.empty(positions, heads, dtype=torch.float32, device=query.device)
        shape = (heads, groups, width, width**-0.5, window or 0, slopes_h is not None)
        rows, keys, warps, stages = TILES["forward"][window is None]
        _forward[_row_tiles(positions, heads, groups, rows)](
            query,
            key,
            value,
            spans,
            slopes_h,
            offset_h,
            out,
            log2_sum_nh,
            positions,
            *shape,
            offset_h is not None,
            rows,
            keys,
            num_warps=warps,
            num_stages=stages,
        )
        ctx.save_for_backward(query, key, value, spans, slopes_h, offset_h, out, log2_sum_nh)
        ctx.shape = shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_nhD: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, spans, slopes_h, offset_h, out, log2_sum_nh = ctx.saved_tensors
        grad_out = grad_out_nhD.contiguous()
        positions, heads, _ = query.shape
        groups = key.shape[1]
        global_layer = ctx.shape[4] == 0
        grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
        product_nh = torch.empty_like(log2_sum_nh)
        grad_offset_nh = None if offset_h is None else torch.empty_like(log2_sum_nh)
        rows, keys, warps, stages = TILES["queries"][global_layer]
        _gradient_of_queries[_row_tiles(positions, heads, groups, rows)](
            query,
            key,
            value,
            spans,
            slopes_h,
            offset_h,
            out,
            log2_sum_nh,
            grad_out,
            product_nh,
            grad_query,
            grad_offset_nh,
            positions,
            *ctx.shape,
            offset_h is not None,
            rows,
            keys,
            num_warps=warps,
            num_stages=stages,
        )
        rows, keys, warps, stages = TILES["keys"][global_layer]
        _gradient_of_keys[(triton.cdiv(positions, keys) * groups,)](
            query,
            key,
            value,
            spans,
            slopes_h,
            log2_sum_nh,
            grad_out,
            product_nh,
            grad_key,
            grad_value,
            positions,
            *ctx.shape,
            rows,
            keys,
            num_warps=warps,
            num_stages=stages,
        )
        grad_offset = None if grad_offset_nh is None else grad_offset_nh.sum(0)
        return grad_query, grad_key, grad_value, grad_offset, None, None, None


def _row_tiles(positions: int, heads: int, groups: int, rows: int) -> tuple[int]:
    return (triton.cdiv(positions * (heads // groups), rows) * groups,)


@triton.jit(do_not_specialize=["n", "runs", "steps"])  # type: ignore[untyped-decorator]
def _spans(boundaries, spans, n, runs, steps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store for each position the first position of its run, then for each the first one after its run."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    low = tl.zeros((BLOCK,), tl.int32)
    high = low + runs
    for _ in range(steps):  # boundaries[low] ≤ i < boundaries[high]
        middle = (low + high) // 2
        right = tl.load(boundaries + middle, mask=inside, other=0) <= i
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    tl.store(spans + i, tl.load(boundaries + low, mask=inside), mask=inside)
    tl.store(spans + n + i, tl.load(boundaries + low + 1, mask=inside), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _rows(  # type: ignore[no-untyped-def]
    spans,
    slopes,
    n,
    H: tl.constexpr,
    G: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIBI: tl.constexpr,
    M: tl.constexpr,
):
    """A program's rows, positions × query heads of a group: (group, first position of the tile, position of
    each row, head of each row, its slope in units of q·k, first key that it sees).

    Rows after the last position repeat it. The last positions come first, because they can see most keys.
    """
    SHARE: tl.constexpr = H // G
    P: tl.constexpr = M // SHARE
    anchor = (tl.cdiv(n, P) - 1 - tl.program_id(0) // G) * P
    group = tl.program_id(0) % G
    row = tl.arange(0, M)
    position = tl.minimum(anchor + row // SHARE, n - 1)
    head = group * SHARE + row % SHARE
    slope = tl.zeros((M,), tl.float32)
    if ALIBI:
        slope = tl.load(slopes + head) / SCALE
    first = tl.load(spans + position)
    if WINDOW > 0:
        first = tl.maximum(first, position - WINDOW + 1)
    return group, anchor, position, head, slope, first


@triton.jit  # type: ignore[untyped-decorator]
def _unmasked(first, anchor, WINDOW: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """(first key that any row of a tile sees, first key after the tiles of keys that all rows see whole)."""
    low = tl.min(first, 0)
    middle = low
    if WINDOW == 0:
        middle = tl.where(tl.max(first, 0) == low, low + (anchor + 1 - low) // N * N, low)
    return low, middle


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    acc,
    total,
    high,
    q,
    key,
    value,
    begin,
    end,
    anchor,
    position,
    slope,
    first,
    GD: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    ALIBI: tl.constexpr,
    MASK: tl.constexpr,
    N: tl.constexpr,
):
    """Add the keys from `begin` to `end` to the rows' Σ P v, Σ P and largest logit (in base 2)."""
    column = tl.arange(0, N)
    inner = tl.arange(0, D)
    for start in range(begin, end, N):
        j = start + column
        at = (tl.minimum(j, end - 1) if MASK else j).to(tl.int64) * GD
        t = tl.dot(q, tl.load(key + at[None, :] + inner[:, None]))
        if ALIBI:  # slope · (j − position) but for a row's constant
            t += slope[:, None] * (j - anchor).to(tl.float32)[None, :]
        if MASK:
            t = tl.where((j[None, :] >= first[:, None]) & (j[None, :] <= position[:, None]), t, float("-inf"))
        above = tl.maximum(high, tl.max(t, 1) * (SCALE * LOG2_E))
        p = tl.exp2(t * (SCALE * LOG2_E) - above[:, None])
        shrink = tl.exp2(high - above)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(value + at[:, None] + inner[None, :])
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        high = above
    return acc, total, high


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    spans,
    slopes,
    offset,
    out,
    log2_sum,
    n,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIBI: tl.constexpr,
    OFFSET: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    group, anchor, position, head, slope, first = _rows(spans, slopes, n, H, G, SCALE, WINDOW, ALIBI, M)
    low, middle = _unmasked(first, anchor, WINDOW, N)
    row = position.to(tl.int64) * H + head
    inner = tl.arange(0, D)
    q = tl.load(query + row[:, None] * D + inner[None, :])
    constant = slope * (position - anchor).to(tl.float32) * (SCALE * LOG2_E)
    acc = tl.zeros((M, D), tl.float32)
    if OFFSET:  # a key that each row sees first, of value 0
        high = tl.load(offset + head) * LOG2_E + constant
        total = tl.full((M,), 1.0, tl.float32)
    else:
        high = tl.full((M,), -1e30, tl.float32)  # finite: a row may see no key of its first tiles
        total = tl.zeros((M,), tl.float32)
    key += group * D
    value += group * D
    if WINDOW == 0:
        acc, total, high = _attend(
            acc,
            total,
            high,
            q,
            key,
            value,
            low,
            middle,
            anchor,
            position,
            slope,
            first,
            G * D,
            D,
            SCALE,
            ALIBI,
            False,
            N,
        )
    end = tl.minimum(anchor + M // (H // G), n)
    acc, total, high = _attend(
        acc,
        total,
        high,
        q,
        key,
        value,
        middle,
        end,
        anchor,
        position,
        slope,
        first,
        G * D,
        D,
        SCALE,
        ALIBI,
        True,
        N,
    )
    inside = anchor + tl.arange(0, M) // (H // G) < n
    tl.store(
        out + row[:, None] * D + inner[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=inside[:, None],
    )
    tl.store(log2_sum + row, high + tl.log2(total) - constant, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _add_to_queries(  # type: ignore[no-untyped-def]
    acc,
    q,
    go,
    constant,
    product,
    key,
    value,
    begin,
    end,
    anchor,
    position,
    slope,
    first,
    GD: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    ALIBI: tl.constexpr,
    MASK: tl.constexpr,
    N: tl.constexpr,
):
    """Add the keys from `begin` to `end` to the rows' Σ gradient · k.

    `constant`: log₂ of each row's sum of weights, plus the constant of ALiBi that its logits leave out.
    """
    column = tl.arange(0, N)
    inner = tl.arange(0, D)
    for start in range(begin, end, N):
        j = start + column
        at = (tl.minimum(j, end - 1) if MASK else j).to(tl.int64) * GD
        k_Dk = tl.load(key + at[None, :] + inner[:, None])
        v_Dk = tl.load(value + at[None, :] + inner[:, None])
        t = tl.dot(q, k_Dk)
        if ALIBI:
            t += slope[:, None] * (j - anchor).to(tl.float32)[None, :]
        p = tl.exp2(t * (SCALE * LOG2_E) - constant[:, None])
        if MASK:
            p = tl.where((j[None, :] >= first[:, None]) & (j[None, :] <= position[:, None]), p, 0.0)
        gradient = p * (tl.dot(go, v_Dk) - product[:, None])
        acc = tl.dot(gradient.to(k_Dk.dtype), tl.trans(k_Dk), acc)
    return acc


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _gradient_of_queries(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    spans,
    slopes,
    offset,
    out,
    log2_sum,
    grad_out,
    product,
    grad_query,
    grad_offset,
    n,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIBI: tl.constexpr,
    OFFSET: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Also stores `product`, Σ_D out · grad_out of each row, which is Σ_j P_ij · (gradient of P_ij)."""
    group, anchor, position, head, slope, first = _rows(spans, slopes, n, H, G, SCALE, WINDOW, ALIBI, M)
    low, middle = _unmasked(first, anchor, WINDOW, N)
    row = position.to(tl.int64) * H + head
    place = row[:, None] * D + tl.arange(0, D)[None, :]
    inside = anchor + tl.arange(0, M) // (H // G) < n
    q = tl.load(query + place)
    go = tl.load(grad_out + place)
    products = tl.sum(tl.load(out + place).to(tl.float32) * go.to(tl.float32), 1)
    tl.store(product + row, products, mask=inside)
    log2_sums = tl.load(log2_sum + row)
    if OFFSET:  # a key of value 0: its weight times (0 − product)
        weight = tl.exp2(tl.load(offset + head) * LOG2_E - log2_sums)
        tl.store(grad_offset + row, -weight * products, mask=inside)
    constant = log2_sums + slope * (position - anchor).to(tl.float32) * (SCALE * LOG2_E)
    acc = tl.zeros((M, D), tl.float32)
    key += group * D
    value += group * D
    if WINDOW == 0:
        acc = _add_to_queries(
            acc,
            q,
            go,
            constant,
            products,
            key,
            value,
            low,
            middle,
            anchor,
            position,
            slope,
            first,
            G * D,
            D,
            SCALE,
            ALIBI,
            False,
            N,
        )
    end = tl.minimum(anchor + M // (H // G), n)
    acc = _add_to_queries(
        acc,
        q,
        go,
        constant,
        products,
        key,
        value,
        middle,
        end,
        anchor,
        position,
        slope,
        first,
        G * D,
        D,
        SCALE,
        ALIBI,
        True,
        N,
    )
    tl.store(grad_query + place, (acc * SCALE).to(grad_query.dtype.element_ty), mask=inside[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _add_to_keys(  # type: ignore[no-untyped-def]
    grad_k,
    grad_v,
    k,
    v,
    query,
    grad_out,
    log2_sum,
    product,
    begin,
    end,
    high,
    n,
    anchor,
    j,
    last,
    slope,
    head,
    ahead,
    H: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    ALIBI: tl.constexpr,
    MASK: tl.constexpr,
    P: tl.constexpr,
):
    """Add the queries from `begin` to `end`, but none from `high` on, to Σ gradient · q and Σ P · grad_out.

    `ahead`: how many positions after the tile's first each row is.
    """
    inner = tl.arange(0, D)
    for start in range(begin, end, P):
        i = start + ahead
        row = tl.minimum(i, n - 1).to(tl.int64) * H + head
        q = tl.load(query + row[:, None] * D + inner[None, :])
        go = tl.load(grad_out + row[:, None] * D + inner[None, :])
        # a weight of 2^−inf for the queries from `high` on
        constant = tl.load(log2_sum + row, mask=i < high, other=float("inf"))
        products = tl.load(product + row)
        t = tl.dot(k, tl.trans(q))
        if ALIBI:
            constant += slope * (i - anchor).to(tl.float32) * (SCALE * LOG2_E)
            t += slope[None, :] * (j - anchor).to(tl.float32)[:, None]
        p = tl.exp2(t * (SCALE * LOG2_E) - constant[None, :])
        if MASK:
            p = tl.where((i[None, :] >= j[:, None]) & (i[None, :] < last[:, None]), p, 0.0)
        grad_v = tl.dot(p.to(go.dtype), go, grad_v)
        gradient = p * (tl.dot(v, tl.trans(go)) - products[None, :])
        grad_k = tl.dot(gradient.to(q.dtype), q, grad_k)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _gradient_of_keys(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    spans,
    slopes,
    log2_sum,
    grad_out,
    product,
    grad_key,
    grad_value,
    n,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIBI: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    SHARE: tl.constexpr = H // G
    P: tl.constexpr = M // SHARE
    anchor = tl.program_id(0) // G * N
    group = tl.program_id(0) % G
    j = tl.minimum(anchor + tl.arange(0, N), n - 1)
    last = tl.load(spans + n + j)
    if WINDOW > 0:
        last = tl.minimum(last, j + WINDOW)
    high = tl.max(last, 0)
    # from `middle` on, a query sees all keys of the tile
    middle = high
    if WINDOW == 0:
        middle = tl.where(tl.min(last, 0) == high, tl.minimum(anchor + tl.cdiv(N - 1, P) * P, high), high)
    place = (j.to(tl.int64) * G + group)[:, None] * D + tl.arange(0, D)[None, :]
    k = tl.load(key + place)
    v = tl.load(value + place)
    row = tl.arange(0, M)
    head = group * SHARE + row % SHARE
    slope = tl.zeros((M,), tl.float32)
    if ALIBI:
        slope = tl.load(slopes + head) / SCALE
    grad_k = tl.zeros((N, D), tl.float32)
    grad_v = tl.zeros((N, D), tl.float32)
    grad_k, grad_v = _add_to_keys(
        grad_k,
        grad_v,
        k,
        v,
        query,
        grad_out,
        log2_sum,
        product,
        anchor,
        middle,
        high,
        n,
        anchor,
        j,
        last,
        slope,
        head,
        row // SHARE,
        H,
        D,
        SCALE,
        ALIBI,
        True,
        P,
    )
    if WINDOW == 0:
        grad_k, grad_v = _add_to_keys(
            grad_k,
            grad_v,
            k,
            v,
            query,
            grad_out,
            log2_sum,
            product,
            middle,
            high,
            high,
            n,
            anchor,
            j,
            last,
            slope,
            head,
            row // SHARE,
            H,
            D,
            SCALE,
            ALIBI,
            False,
            P,
        )
    inside = (anchor + tl.arange(0, N) < n)[:, None]
    tl.store(grad_key + place, (grad_k * SCALE).to(grad_key.dtype.element_ty), mask=inside)
    tl.store(grad_value + place, grad_v.to(grad_value.dtype.element_ty), mask=inside)
