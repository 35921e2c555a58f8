"""The student's layers between their dense matrix products, for inference on a GPU: Triton kernels.

In plain torch (modeling_vpmoe.py) they are about a hundred kernels a layer, and decoding takes as long as
launching them. Here a layer has eight: queries, keys and values; residual sum and norm, twice; choice of
experts; their rows; the experts' two products; squared ReLU. Sums, norms, rotation and routing are in fp32,
and numbers are rounded where a kernel stores them. There are no gradients and no atomic additions. A row's
result depends on the other rows of a step by the size of tiles alone, so by the order of sums.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

CHOICES = 1024
"""Choices that a program of `_sort` reads at a time."""


def project_heads(
    query_NF: Tensor,
    key_NF: Tensor,
    value_NF: Tensor,
    *,
    heads: int,
    groups: int,
    ranks: tuple[int, int] | None,
    bias: Tensor | None,
    norms: tuple[Tensor, Tensor],
    epsilon: float,
    rotation: tuple[Tensor, Tensor] | None,
    residual: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised, rotated queries [N, heads, D] and keys [N, groups, D], and mixed values [N, groups, D].

    Without `ranks` the inputs are linear projections; with them each is the mixtures and vectors of a tensor
    product (tensor_product.py), to which `bias` is added, flat: queries, keys, values. `norms`: weights [D]
    of queries and keys. `rotation`: cos and sin, fp32 [N, D]. `residual`: (number [1] whose sigmoid λ is,
    first layer's values [N, groups, D]) for λ · value + (1 − λ) · first. D is a power of 2.
    """
    tokens, width = len(query_NF), len(norms[0])
    query, key, value = (query_NF.new_empty(tokens, count, width) for count in (heads, groups, groups))
    cos, sin = rotation or (None, None)
    mix, first = residual or (None, None)
    _heads[(tokens, heads + 2 * groups)](
        query_NF,
        key_NF,
        value_NF,
        bias,
        *norms,
        cos,
        sin,
        mix,
        first,
        query,
        key,
        value,
        query_NF.stride(0),
        key_NF.stride(0),
        value_NF.stride(0),
        epsilon,
        heads,
        groups,
        width,
        *(ranks or (0, 0)),
        bias is not None,
        rotation is not None,
        residual is not None,
        num_warps=1,
    )
    return query, key, value


def add_and_norm(
    hidden_NH: Tensor, addends: Tensor, shared_NH: Tensor | None, weight_H: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """(hidden + Σ addends + shared, its RMSNorm), both [N, H]. `addends` is [N, H], or [N, K, H] to sum over
    K."""
    tokens, width = hidden_NH.shape
    out_NH, normed_NH = torch.empty_like(hidden_NH), torch.empty_like(hidden_NH)
    _add_and_norm[(tokens,)](
        hidden_NH,
        addends,
        shared_NH,
        weight_H,
        out_NH,
        normed_NH,
        epsilon,
        width,
        triton.next_power_of_2(width),
        1 if addends.dim() == 2 else addends.shape[1],
        shared_NH is not None,
    )
    return out_NH, normed_NH


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)² of a contiguous tensor."""
    out = torch.empty_like(x)
    _squared_relu[(triton.cdiv(x.numel(), CHOICES),)](x, out, x.numel(), CHOICES)
    return out


def choose_experts(
    logits_NE: Tensor,
    bias_E: Tensor | None,
    selection_bias_E: Tensor,
    *,
    choices: int,
    groups: int,
    chosen_groups: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """(experts [N, K] int32, their weights [N, K] fp32) as modeling_vpmoe.Router chooses them from fp32
    logits. Of equal scores it takes the first. All sizes but N are powers of 2."""
    tokens, experts = logits_NE.shape
    expert_NK = torch.empty(tokens, choices, dtype=torch.int32, device=logits_NE.device)
    weight_NK = torch.empty(tokens, choices, dtype=torch.float32, device=logits_NE.device)
    _choose[(tokens,)](
        logits_NE,
        bias_E,
        selection_bias_E,
        expert_NK,
        weight_NK,
        scaling,
        experts,
        groups,
        choices,
        chosen_groups,
        bias_E is not None,
        num_warps=1,
    )
    return expert_NK, weight_NK


def sort_by_expert(expert_NK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(choices sorted by expert [N · K], where each expert's begin and the last ends [E + 1]), int32."""
    size = expert_NK.numel()
    order_C = torch.empty(size, dtype=torch.int32, device=expert_NK.device)
    starts_E = torch.empty(experts + 1, dtype=torch.int32, device=expert_NK.device)
    _sort[(experts,)](expert_NK, order_C, starts_E, size, experts, CHOICES)
    return order_C, starts_E


def apply_experts(
    hidden_NH: Tensor,
    expert_NK: Tensor,
    weight_NK: Tensor,
    up_EWH: Tensor,
    up_bias_EW: Tensor | None,
    down_EHW: Tensor,
    down_bias_EH: Tensor | None,
) -> Tensor:
    """[N, K, H]: each choice's expert of its token, times its weight. H and W are powers of 2 from 16 on."""
    experts, inner, width = up_EWH.shape
    tokens, choices = expert_NK.shape
    order_C, starts_E = sort_by_expert(expert_NK, experts)
    rows, columns, step, stages = _tile(tokens * choices, experts)
    biased = up_bias_EW is not None
    inner_CW = hidden_NH.new_empty(tokens * choices, inner)
    tile = min(columns, inner)
    _expand[(experts, inner // tile)](
        hidden_NH,
        order_C,
        starts_E,
        weight_NK,
        up_EWH,
        up_bias_EW,
        inner_CW,
        choices,
        width,
        inner,
        biased,
        rows,
        tile,
        min(step, width),
        num_stages=stages,
    )
    out_NKH = hidden_NH.new_empty(tokens, choices, width)
    tile = min(columns, width)
    _reduce[(experts, width // tile)](
        inner_CW,
        order_C,
        starts_E,
        weight_NK,
        down_EHW,
        down_bias_EH,
        out_NKH,
        width,
        inner,
        biased,
        rows,
        tile,
        min(64, inner),
        num_stages=3,
    )
    return out_NKH


def _tile(choices: int, experts: int) -> tuple[int, int, int, int]:
    """Of a tile of the experts' products: rows, columns, and the first product's step and its loads ahead, as
    measured on an H200 with 64, 512 and 1,024 tokens of vpmoe-6b: few rows an expert are bound by reading
    weights."""
    if choices <= 12 * experts:
        return 16, 64, 128, 3
    return 32 if choices <= 48 * experts else 64, 128, 64, 4


@triton.jit  # type: ignore[untyped-decorator]
def _head(  # type: ignore[no-untyped-def]
    source,
    h,
    bias,
    weight,
    cos,
    sin,
    mix,
    first,
    out,
    epsilon,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BIASED: tl.constexpr,
    NORM: tl.constexpr,
    ROTATES: tl.constexpr,
    MIXES: tl.constexpr,
):
    """Head `h` of a token's queries, keys or values. The rotation's pairs are its halves."""
    half: tl.constexpr = D // 2
    i = tl.arange(0, half)
    if R == 0:
        low = tl.load(source + h * D + i).to(tl.float32)
        high = tl.load(source + h * D + half + i).to(tl.float32)
    else:
        low = tl.zeros((half,), tl.float32)
        high = tl.zeros((half,), tl.float32)
        for r in tl.static_range(R):
            a = tl.load(source + h * R + r).to(tl.float32)
            vector = source + COUNT * R + r * D + i
            low += a * tl.load(vector).to(tl.float32)
            high += a * tl.load(vector + half).to(tl.float32)
        low = low / R
        high = high / R
    if BIASED:
        low += tl.load(bias + h * D + i).to(tl.float32)
        high += tl.load(bias + h * D + half + i).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    low = low.to(dtype).to(tl.float32)  # as the trainer stores it
    high = high.to(dtype).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / D + epsilon)
        low = low * scale * tl.load(weight + i).to(tl.float32)
        high = high * scale * tl.load(weight + half + i).to(tl.float32)
    if ROTATES:
        c = tl.load(cos + i)
        s = tl.load(sin + i)
        turned = low * c - high * s
        high = high * c + low * s
        low = turned
    if MIXES:
        share = tl.sigmoid(tl.load(mix))
        low = share * low + (1 - share) * tl.load(first + i).to(tl.float32)
        high = share * high + (1 - share) * tl.load(first + half + i).to(tl.float32)
    tl.store(out + i, low.to(dtype))
    tl.store(out + half + i, high.to(dtype))


@triton.jit  # type: ignore[untyped-decorator]
def _heads(  # type: ignore[no-untyped-def]
    query_in,
    key_in,
    value_in,
    bias,
    query_norm,
    key_norm,
    cos,
    sin,
    mix,
    first,
    query,
    key,
    value,
    query_stride,
    key_stride,
    value_stride,
    epsilon,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    QUERY_RANK: tl.constexpr,
    RANK: tl.constexpr,
    BIASED: tl.constexpr,
    ROTATES: tl.constexpr,
    MIXES: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    if ROTATES:
        cos += n * D
        sin += n * D
    if h < H:
        _head(
            query_in + n * query_stride,
            h,
            bias,
            query_norm,
            cos,
            sin,
            mix,
            first,
            query + (n * H + h) * D,
            epsilon,
            H,
            D,
            QUERY_RANK,
            BIASED,
            True,
            ROTATES,
            False,
        )
    elif h < H + G:
        if BIASED:
            bias += H * D
        _head(
            key_in + n * key_stride,
            h - H,
            bias,
            key_norm,
            cos,
            sin,
            mix,
            first,
            key + (n * G + h - H) * D,
            epsilon,
            G,
            D,
            RANK,
            BIASED,
            True,
            ROTATES,
            False,
        )
    else:
        place = (n * G + h - H - G) * D
        if BIASED:
            bias += (H + G) * D
        if MIXES:
            first += place
        _head(
            value_in + n * value_stride,
            h - H - G,
            bias,
            key_norm,
            cos,
            sin,
            mix,
            first,
            value + place,
            epsilon,
            G,
            D,
            RANK,
            BIASED,
            False,
            False,
            MIXES,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _add_and_norm(  # type: ignore[no-untyped-def]
    hidden,
    addends,
    shared,
    weight,
    out,
    normed,
    epsilon,
    H: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, B)
    inside = i < H
    x = tl.load(hidden + n * H + i, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        x += tl.load(addends + (n * K + k) * H + i, mask=inside, other=0.0).to(tl.float32)
    if SHARED:
        x += tl.load(shared + n * H + i, mask=inside, other=0.0).to(tl.float32)
    rounded = x.to(out.dtype.element_ty)
    tl.store(out + n * H + i, rounded, mask=inside)
    x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / H + epsilon)
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + n * H + i, (x * scale * w).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _squared_relu(x, out, n, B: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    positive = tl.maximum(tl.load(x + i, mask=i < n, other=0.0).to(tl.float32), 0.0)
    tl.store(out + i, (positive * positive).to(out.dtype.element_ty), mask=i < n)


@triton.jit  # type: ignore[untyped-decorator]
def _choose(  # type: ignore[no-untyped-def]
    logits,
    bias,
    selection_bias,
    expert,
    weight,
    scaling,
    E: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    CHOSEN: tl.constexpr,
    BIASED: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, E)
    logit = tl.load(logits + n * E + e)
    if BIASED:
        logit += tl.load(bias + e).to(tl.float32)
    score = tl.sigmoid(logit)
    by_group = tl.reshape(score + tl.load(selection_bias + e), (G, E // G))
    rest = by_group
    group = tl.zeros((G,), tl.float32)
    for _ in tl.static_range(K // CHOSEN):
        group += tl.max(rest, 1)
        best = tl.argmax(rest, 1)
        rest = tl.where(tl.arange(0, E // G)[None, :] == best[:, None], float("-inf"), rest)
    chosen = tl.zeros((G,), tl.int32)
    for _ in tl.static_range(CHOSEN):
        hit = tl.arange(0, G) == tl.argmax(group, 0)
        chosen = tl.where(hit, 1, chosen)
        group = tl.where(hit, float("-inf"), group)
    left = tl.reshape(tl.where(chosen[:, None] == 1, by_group, float("-inf")), (E,))
    k = tl.arange(0, K)
    expert_K = tl.zeros((K,), tl.int32)
    weight_K = tl.zeros((K,), tl.float32)
    for number in tl.static_range(K):
        best = tl.argmax(left, 0)
        expert_K = tl.where(k == number, best, expert_K)
        weight_K = tl.where(k == number, tl.sum(tl.where(e == best, score, 0.0), 0), weight_K)
        left = tl.where(e == best, float("-inf"), left)
    tl.store(expert + n * K + k, expert_K)
    tl.store(weight + n * K + k, weight_K / (tl.sum(weight_K, 0) + 1e-20) * scaling)


@triton.jit(do_not_specialize=["size"])  # type: ignore[untyped-decorator]
def _sort(expert, order, starts, size, E: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program an expert: counts the choices of experts before it, then lists its own in order."""
    e = tl.program_id(0)
    i = tl.arange(0, B)
    before = tl.zeros((B,), tl.int32)
    for start in range(0, size, B):
        chosen = tl.load(expert + start + i, mask=start + i < size, other=E)
        before += (chosen < e).to(tl.int32)
    place = tl.sum(before, 0)
    tl.store(starts + e, place)
    if e == E - 1:
        tl.store(starts + E, size)
    for start in range(0, size, B):
        own = (tl.load(expert + start + i, mask=start + i < size, other=E) == e).to(tl.int32)
        tl.store(order + place + tl.cumsum(own, 0) - 1, start + i, mask=own == 1)
        place += tl.sum(own, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _expand(  # type: ignore[no-untyped-def]
    hidden,
    order,
    starts,
    weight,
    up,
    bias,
    inner,
    K: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BIASED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
):
    """Rows sorted by expert: weight · relu(up · x + b₁)²."""
    e = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    i = tl.arange(0, STEP)
    end = tl.load(starts + e + 1)
    for first in range(tl.load(starts + e), end, M):
        row = first + tl.arange(0, M)
        inside = row < end
        choice = tl.load(order + row, mask=inside, other=0)
        left = hidden + (choice // K).to(tl.int64)[:, None] * H + i[None, :]
        right = up + (e * W + column)[None, :] * H + i[:, None]
        acc = tl.zeros((M, N), tl.float32)
        for _ in range(0, H, STEP):
            x = tl.load(left, mask=inside[:, None], other=0.0)
            acc = tl.dot(x, tl.load(right), acc, input_precision="ieee")
            left += STEP
            right += STEP
        if BIASED:
            acc += tl.load(bias + e * W + column).to(tl.float32)[None, :]
        acc = tl.maximum(acc, 0.0)
        acc = acc * acc * tl.load(weight + choice, mask=inside, other=0.0)[:, None]
        place = inner + row.to(tl.int64)[:, None] * W + column[None, :]
        tl.store(place, acc.to(inner.dtype.element_ty), mask=inside[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _reduce(  # type: ignore[no-untyped-def]
    inner,
    order,
    starts,
    weight,
    down,
    bias,
    out,
    H: tl.constexpr,
    W: tl.constexpr,
    BIASED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
):
    """down · inner + weight · b₂ of the rows, in the order of the choices again."""
    e = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    i = tl.arange(0, STEP)
    end = tl.load(starts + e + 1)
    for first in range(tl.load(starts + e), end, M):
        row = first + tl.arange(0, M)
        inside = row < end
        choice = tl.load(order + row, mask=inside, other=0)
        left = inner + row.to(tl.int64)[:, None] * W + i[None, :]
        right = down + (e * H + column)[None, :] * W + i[:, None]
        acc = tl.zeros((M, N), tl.float32)
        for _ in range(0, W, STEP):
            x = tl.load(left, mask=inside[:, None], other=0.0)
            acc = tl.dot(x, tl.load(right), acc, input_precision="ieee")
            left += STEP
            right += STEP
        if BIASED:
            share = tl.load(weight + choice, mask=inside, other=0.0)
            acc += share[:, None] * tl.load(bias + e * H + column).to(tl.float32)[None, :]
        place = out + choice.to(tl.int64)[:, None] * H + column[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), mask=inside[:, None])
