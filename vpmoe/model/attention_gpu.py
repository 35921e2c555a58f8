"""Attention inside documents on a GPU, with an optional window, ALiBi and a softmax offset: Triton kernels.

FlashAttention's method (arXiv 2307.08691): one pass over tiles of keys with a running maximum and sum, and a
backward pass that computes the weights again from the stored log of the sum. Memory is linear in positions.
Tiles cut the packed positions without regard to documents, and a tile reads where the documents of its
positions begin and end. So neither grid nor compiled code depends on the documents' lengths. A tile's rows
are positions × the query heads that share a key-value head: each key is loaded once for all of them. The
gradients of keys take the queries of these heads one head after the other, and are one sum in registers. No
atomic additions, so results are the same in each call. What loops load comes by tensor descriptors: Hopper's
copy engine reads whole tiles, where addresses of single numbers took more instructions than the arithmetic.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[import-untyped]

TILES = {
    "forward": ((64, 32, 4, 2, 128), (64, 64, 4, 3, None)),
    "queries": ((128, 32, 8, 3, 128), (128, 64, 8, 3, None)),
    "keys": ((64, 64, 4, 2, None), (64, 64, 4, 2, None)),
}
"""(rows, keys, warps, stages of loads in flight, most registers a thread) of a tile: of the output, of the
gradient of queries and of those of keys and values, each with a window and without. The fastest of about ten
on an H200 with 4 query heads of width 128 a key-value head."""
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
ORDER_BLOCK = 64
"""Tiles of one program of `_most_work_first`."""
ROW_ALIGNMENT: tl.constexpr = tl.constexpr(4)
"""fp32 numbers in the 16 bytes at which a tile of them has to begin."""


def packed_attention(
    query_nhD: Tensor,
    key_ngD: Tensor,
    value_ngD: Tensor,
    runs_2n: Tensor,
    *,
    window: int | None,
    slopes_h: Tensor | None,
    offset_h: Tensor | None,
) -> Tensor:
    """[n, heads, width]: Σ_j P_ij v_j inside each run, with

        P_ij = exp(l_ij) / (exp(offset) + Σ_j exp(l_ij)),  l_ij = q_i·k_j / √width − slope · (i − j),
        i − window < j ≤ i

    bf16 or fp16, sums in fp32. n positions of all runs, one run after the other; `runs_2n` int32 as
    batch.runs_of. Query head h uses the key-value head h // (heads / groups). `window` counts the query's
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
        query_nhD, key_ngD, value_ngD, offset_h, runs_2n, window, slopes_h
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
        runs: Tensor,
        window: int | None,
        slopes_h: Tensor | None,
    ) -> Tensor:
        query, key, value = (x.contiguous() for x in (query_nhD, key_ngD, value_ngD))
        positions, heads, width = query.shape
        groups = key.shape[1]
        out = torch.empty_like(query)
        log2_sum_hn = _numbers_of_rows(heads, positions, query.device)
        shape = (heads, groups, width, width**-0.5, window or 0, slopes_h is not None)
        rows, keys, warps, stages, registers = TILES["forward"][window is None]
        block = TILES["keys"][window is None][0]
        _forward[_row_tiles(positions, heads, groups, rows)](
            query,
            _tiles(key, keys),
            _tiles(value, keys),
            runs,
            slopes_h,
            offset_h,
            out,
            log2_sum_hn,
            positions,
            *shape,
            offset_h is not None,
            rows,
            keys,
            block,
            num_warps=warps,
            num_stages=stages,
            maxnreg=registers,
        )
        ctx.save_for_backward(query, key, value, runs, slopes_h, offset_h, out, log2_sum_hn)
        ctx.shape = shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_nhD: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, runs, slopes_h, offset_h, out, log2_sum_hn = ctx.saved_tensors
        grad_out = grad_out_nhD.contiguous()
        positions, heads, _ = query.shape
        groups = key.shape[1]
        global_layer = ctx.shape[4] == 0
        grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
        product_hn = _numbers_of_rows(heads, positions, query.device)
        grad_offset_hn = None if offset_h is None else log2_sum_hn.new_empty(heads, positions)
        block = TILES["keys"][global_layer][0]
        rows, keys, warps, stages, registers = TILES["queries"][global_layer]
        _gradient_of_queries[_row_tiles(positions, heads, groups, rows)](
            query,
            _tiles(key, keys),
            _tiles(value, keys),
            runs,
            slopes_h,
            offset_h,
            out,
            log2_sum_hn,
            grad_out,
            product_hn,
            grad_query,
            grad_offset_hn,
            positions,
            *ctx.shape,
            offset_h is not None,
            rows,
            keys,
            block,
            num_warps=warps,
            num_stages=stages,
            maxnreg=registers,
        )
        _, keys, warps, stages, registers = TILES["keys"][global_layer]
        tiles = triton.cdiv(positions, keys)
        order = None
        if global_layer:
            order = torch.empty(tiles, dtype=torch.int32, device=query.device)
            _most_work_first[(triton.cdiv(tiles, ORDER_BLOCK),)](runs, order, positions, keys, ORDER_BLOCK)
        _gradient_of_keys[(tiles * groups,)](
            _tiles(query, block),
            key,
            value,
            runs,
            order,
            slopes_h,
            _number_tiles(log2_sum_hn, block),
            _tiles(grad_out, block),
            _number_tiles(product_hn, block),
            grad_key,
            grad_value,
            positions,
            *ctx.shape,
            block,
            keys,
            num_warps=warps,
            num_stages=stages,
            maxnreg=registers,
        )
        grad_offset = None if grad_offset_hn is None else grad_offset_hn.sum(1)
        return grad_query, grad_key, grad_value, grad_offset, None, None, None


def _tiles(x_nhD: Tensor, positions: int) -> TensorDescriptor:
    """Descriptor by which the GPU copies tiles of `positions` of one head, zeros after the last position."""
    n, heads, width = x_nhD.shape
    return TensorDescriptor(x_nhD, [n, heads * width], [heads * width, 1], [positions, width])


def _numbers_of_rows(heads: int, positions: int, device: torch.device) -> Tensor:
    """[heads, positions rounded up to ROW_ALIGNMENT] fp32. Padding, which a tile may read, is 0."""
    padded = -(-positions // ROW_ALIGNMENT.value) * ROW_ALIGNMENT.value
    make = torch.empty if padded == positions else torch.zeros
    return make(heads, padded, dtype=torch.float32, device=device)


def _number_tiles(x_hn: Tensor, positions: int) -> TensorDescriptor:
    """Descriptor of one number a position, head after head; a tile may run into the next head."""
    return TensorDescriptor(x_hn, [x_hn.numel()], [1], [positions])


def _row_tiles(positions: int, heads: int, groups: int, rows: int) -> tuple[int]:
    return (triton.cdiv(positions * (heads // groups), rows) * groups,)


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _most_work_first(runs, order, n, N: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store the numbers of the tiles of N keys by how many queries come after them in the document of their
    last key, most first. Otherwise the GPU waits at the end for a long one that began late."""
    tiles = tl.cdiv(n, N)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    work = tl.load(runs + n + tl.minimum(tile * N + N, n) - 1, mask=tile < tiles, other=0) - tile * N
    place = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, tiles, BLOCK):
        other = begin + tl.arange(0, BLOCK)
        others = tl.load(runs + n + tl.minimum(other * N + N, n) - 1) - other * N
        ahead = (others[None, :] > work[:, None]) | (
            (others[None, :] == work[:, None]) & (other[None, :] < tile[:, None])
        )
        place += tl.sum((ahead & (other < tiles)[None, :]).to(tl.int32), 1)
    tl.store(order + place, tile, mask=tile < tiles)


@triton.jit
def _padded(n):  # type: ignore[no-untyped-def]
    return tl.cdiv(n, ROW_ALIGNMENT) * ROW_ALIGNMENT


@triton.jit  # type: ignore[untyped-decorator]
def _rows(  # type: ignore[no-untyped-def]
    runs,
    slopes,
    n,
    H: tl.constexpr,
    G: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIBI: tl.constexpr,
    M: tl.constexpr,
):
    """A program's rows, positions × query heads of a group: (group, first position of the tile, position of
    each row, head of each row, its slope, first key that it sees).

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
        slope = tl.load(slopes + head)
    first = tl.load(runs + position)
    if WINDOW > 0:
        first = tl.maximum(first, position - WINDOW + 1)
    return group, anchor, position, head, slope, first


@triton.jit  # type: ignore[untyped-decorator]
def _visible_keys(  # type: ignore[no-untyped-def]
    runs, n, anchor, WINDOW: tl.constexpr, P: tl.constexpr, N: tl.constexpr
):
    """(first key that a tile of P positions may see, first after the tiles of keys that all see whole, end).

    With a window the first does not depend on the document's beginning, so the first loads need not wait
    for it; keys before it are masked.
    """
    end = tl.minimum(anchor + P, n)
    if WINDOW > 0:
        low = tl.maximum(anchor - WINDOW + 1, 0)
        middle = low
    else:
        low = tl.load(runs + anchor)
        one_run = tl.load(runs + end - 1) == low
        middle = tl.where(one_run, low + (anchor + 1 - low) // N * N, low)
    return low, middle, end


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
    group,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    ALIBI: tl.constexpr,
    MASK: tl.constexpr,
    N: tl.constexpr,
):
    """Add the keys from `begin` to `end` to the rows' Σ P v, Σ P and largest logit (in base 2)."""
    column = tl.arange(0, N)
    # two stages if masked: without a window that is few tiles, and with more stages their buffers would not
    # leave room for two programs on a multiprocessor; with a window two are the fastest
    for start in tl.range(begin, end, N, num_stages=2 if MASK else None):
        t = tl.dot(q, key.load([start, group * D]).T)
        if ALIBI:  # slope · (j − position) but for a row's constant, in units of q·k
            t += (slope / SCALE)[:, None] * (start - anchor + column).to(tl.float32)[None, :]
        if MASK:
            j = start + column
            t = tl.where((j[None, :] >= first[:, None]) & (j[None, :] <= position[:, None]), t, float("-inf"))
        above = tl.maximum(high, tl.max(t, 1) * (SCALE * LOG2_E))
        p = tl.exp2(t * (SCALE * LOG2_E) - above[:, None])
        shrink = tl.exp2(high - above)
        total = total * shrink + tl.sum(p, 1)
        v = value.load([start, group * D])
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        high = above
    return acc, total, high


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    runs,
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
    BLOCK: tl.constexpr,
):
    """`log2_sum` [heads, n]: log₂ of a row's sum of weights plus slope · (the row's place in its block of
    BLOCK positions) · log₂ e, which is what `_gradient_of_keys` needs."""
    SHARE: tl.constexpr = H // G
    group, anchor, position, head, slope, first = _rows(runs, slopes, n, H, G, WINDOW, ALIBI, M)
    low, middle, end = _visible_keys(runs, n, anchor, WINDOW, M // SHARE, N)
    place = (position.to(tl.int64) * H + head)[:, None] * D + tl.arange(0, D)[None, :]
    q = tl.load(query + place)
    constant = slope * (position - anchor).to(tl.float32) * LOG2_E
    acc = tl.zeros((M, D), tl.float32)
    if OFFSET:  # a key that each row sees first, of value 0
        high = tl.load(offset + head) * LOG2_E + constant
        total = tl.full((M,), 1.0, tl.float32)
    else:
        high = tl.full((M,), -1e30, tl.float32)  # finite: a row may see no key of its first tiles
        total = tl.zeros((M,), tl.float32)
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
            group,
            D,
            SCALE,
            ALIBI,
            False,
            N,
        )
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
        group,
        D,
        SCALE,
        ALIBI,
        True,
        N,
    )
    inside = anchor + tl.arange(0, M) // SHARE < n
    tl.store(out + place, (acc * (1 / total)[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    if ALIBI:
        constant -= slope * (position % BLOCK).to(tl.float32) * LOG2_E
    tl.store(log2_sum + head * _padded(n) + position, high + tl.log2(total) - constant, mask=inside)


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
    group,
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
    for start in range(begin, end, N):
        k = key.load([start, group * D])
        v = value.load([start, group * D])
        t = tl.dot(q, k.T)
        gradient = tl.dot(go, v.T)
        if ALIBI:
            distance = (start - anchor + column).to(tl.float32)
            bias = (slope * LOG2_E)[:, None] * distance[None, :] - constant[:, None]
            p = tl.exp2(t * (SCALE * LOG2_E) + bias)
        else:
            p = tl.exp2(t * (SCALE * LOG2_E) - constant[:, None])
        if MASK:
            j = start + column
            p = tl.where((j[None, :] >= first[:, None]) & (j[None, :] <= position[:, None]), p, 0.0)
        gradient = p * (gradient - product[:, None])
        acc = tl.dot(gradient.to(k.dtype), k, acc)
    return acc


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _gradient_of_queries(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    runs,
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
    BLOCK: tl.constexpr,
):
    """Also stores `product` [heads, n], Σ_D out · grad_out of each row, which is Σ_j P_ij · (gradient of
    P_ij)."""
    SHARE: tl.constexpr = H // G
    group, anchor, position, head, slope, first = _rows(runs, slopes, n, H, G, WINDOW, ALIBI, M)
    low, middle, end = _visible_keys(runs, n, anchor, WINDOW, M // SHARE, N)
    place = (position.to(tl.int64) * H + head)[:, None] * D + tl.arange(0, D)[None, :]
    row = head * _padded(n) + position
    inside = anchor + tl.arange(0, M) // SHARE < n
    q = tl.load(query + place)
    go = tl.load(grad_out + place)
    log2_sums = tl.load(log2_sum + row)  # before the stores, behind which it would wait
    if ALIBI:
        log2_sums -= slope * (position % BLOCK).to(tl.float32) * LOG2_E
    constant = log2_sums + slope * (position - anchor).to(tl.float32) * LOG2_E
    offsets = tl.zeros((M,), tl.float32)
    if OFFSET:
        offsets = tl.load(offset + head) * LOG2_E
    products = tl.sum(tl.load(out + place).to(tl.float32) * go.to(tl.float32), 1)
    tl.store(product + row, products, mask=inside)
    if OFFSET:  # a key of value 0: its weight times (0 − product)
        tl.store(grad_offset + head * n + position, -tl.exp2(offsets - log2_sums) * products, mask=inside)
    acc = tl.zeros((M, D), tl.float32)
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
            group,
            D,
            SCALE,
            ALIBI,
            False,
            N,
        )
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
        group,
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
    slopes,
    log2_sum,
    product,
    steps,
    diagonal,
    last_block,
    n,
    anchor,
    j,
    last,
    first_head,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    ALIBI: tl.constexpr,
    MASK: tl.constexpr,
    P: tl.constexpr,
):
    """Add blocks of P positions of one head, SHARE steps a block, to Σ gradient · q and Σ P · grad_out: with
    MASK the first `diagonal` blocks from the tile's first position on and then `last_block`, otherwise those
    after the first `diagonal`.
    """
    row_length = _padded(n)
    slope = tl.zeros((), tl.float32)
    if ALIBI:
        slope = tl.load(slopes + first_head)
    for step in range(steps):
        block = step // SHARE
        if MASK:
            block = tl.where(block < diagonal, block, last_block)
        else:
            block += diagonal
        start = anchor + block * P
        head = first_head + step % SHARE
        q = query.load([start, head * D])
        go = grad_out.load([start, head * D])
        constant = log2_sum.load([head * row_length + start])
        t = tl.dot(k, q.T)
        gradient = tl.dot(v, go.T)
        if ALIBI:
            bias = (slope * LOG2_E * (j - start).to(tl.float32))[:, None] - constant[None, :]
            p = tl.exp2(t * (SCALE * LOG2_E) + bias)
        else:
            p = tl.exp2(t * (SCALE * LOG2_E) - constant[None, :])
        if MASK:
            i = start + tl.arange(0, P)
            p = tl.where((i[None, :] >= j[:, None]) & (i[None, :] < last[:, None]), p, 0.0)
        products = product.load([head * row_length + start])
        grad_v = tl.dot(p.to(go.dtype), go, grad_v)
        gradient = p * (gradient - products[None, :])
        if ALIBI:  # of the next step, which would wait for it
            slope = tl.load(slopes + first_head + (step + 1) % SHARE)
        grad_k = tl.dot(gradient.to(q.dtype), q, grad_k)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _gradient_of_keys(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    runs,
    order,
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
    P: tl.constexpr,
    N: tl.constexpr,
):
    """A tile of N keys and all queries that see them, P positions of one head at a time; P divides N."""
    tl.static_assert(N % P == 0)
    SHARE: tl.constexpr = H // G
    tile = tl.program_id(0) // G
    if WINDOW == 0:
        tile = tl.load(order + tile)
    anchor = tile * N
    group = tl.program_id(0) % G
    first_head = group * SHARE
    end = tl.minimum(anchor + N, n)
    j = tl.minimum(anchor + tl.arange(0, N), n - 1)
    last = tl.load(runs + n + j)
    if WINDOW > 0:
        last = tl.minimum(last, j + WINDOW)
        blocks = tl.cdiv(tl.minimum(end - 1 + WINDOW, n) - anchor, P)
        diagonal = blocks
        whole = blocks
    else:  # from `diagonal` to `whole` all queries of a block see all keys of the tile
        high = tl.load(runs + n + end - 1)
        blocks = tl.cdiv(high - anchor, P)
        one_run = tl.load(runs + n + anchor) == high
        diagonal = tl.where(one_run, tl.minimum(tl.cdiv(N - 1, P), blocks), blocks)
        whole = tl.maximum((high - anchor) // P, diagonal)
    place = (j.to(tl.int64) * G + group)[:, None] * D + tl.arange(0, D)[None, :]
    k = tl.load(key + place)
    v = tl.load(value + place)
    grad_k = tl.zeros((N, D), tl.float32)
    grad_v = tl.zeros((N, D), tl.float32)
    grad_k, grad_v = _add_to_keys(
        grad_k,
        grad_v,
        k,
        v,
        query,
        grad_out,
        slopes,
        log2_sum,
        product,
        (diagonal + blocks - whole) * SHARE,
        diagonal,
        blocks - 1,
        n,
        anchor,
        j,
        last,
        first_head,
        SHARE,
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
            slopes,
            log2_sum,
            product,
            (whole - diagonal) * SHARE,
            diagonal,
            blocks - 1,
            n,
            anchor,
            j,
            last,
            first_head,
            SHARE,
            D,
            SCALE,
            ALIBI,
            False,
            P,
        )
    inside = (anchor + tl.arange(0, N) < n)[:, None]
    tl.store(grad_key + place, (grad_k * SCALE).to(grad_key.dtype.element_ty), mask=inside)
    tl.store(grad_value + place, grad_v.to(grad_value.dtype.element_ty), mask=inside)
