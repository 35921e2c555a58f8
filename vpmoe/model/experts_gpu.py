"""The routed experts of a mixture layer on a GPU, from tokens to their sums over experts: Triton kernels.

A choice is a token and one of its experts. Sorted by expert, the choices of an expert are consecutive rows,
and a table made on the GPU cuts them into tiles, each of one expert. So grids depend on shapes alone, and
nothing is read by the host. Products with a side as wide as a token read the tokens through the order:

    forward   up: inner = x[token] · upᵀ + b₁, act = share · squared_relu(inner)
              rows = act · downᵀ + share · b₂, summed by token (dispatch_gpu.py), with what is beside them
    backward  act's gradient = grad[token] · down, and from it those of inner and share
              of down: grad[token]ᵀ · act; of up: innerᵀ's gradient · x[token]
              rows = inner's gradient · up, summed by token

No copy of tokens in the experts' order is written, and what stands between two products is done in registers.
Gradients of weights and biases are added to megatron's fp32 buffers where there are some. Each is one
program's sum over all rows of its expert: no atomic additions, so results are the same in each call.

With a group of ranks that share a set of experts, tokens and gradients are gathered from all of them before
these products, and the sums by token are summed over the ranks and scattered (expert_exchange.py). Choices of
other ranks' experts have no row. What is kept for the backward are this rank's tokens, which the norm keeps
anyway: the backward gathers them again, beside its first product.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, Work

from vpmoe.model.dispatch_gpu import sum_of_rows
from vpmoe.model.expert_exchange import all_gather, reduce_scatter, start_all_gather
from vpmoe.model.main_gradient import add_to_main_gradient

ROWS = 128
"""Rows of a tile."""
TILES = {
    "up": (64, 8, 3),
    "down's gradient": (64, 8, 3),
    "rows": (64, 4, 2),
    "weights": (64, 128, 8, 5),
}
"""(hidden numbers of a step; warps, stages of loads in flight) of the products from tokens; (columns of a
step; warps, stages) of those to rows; (rows of a step, hidden numbers of a tile; …) of the gradients of
weights. At most: `_steps`."""
SIDE: tl.constexpr = tl.constexpr(16)
"""Columns of the small product in which the gradient of a bias is summed; all are equal."""


def mixture(
    x_NH: Tensor,
    share_C: Tensor,
    up_EWH: Tensor,
    down_EHW: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    order_C: Tensor,
    inverse_C: Tensor,
    tokens_E: Tensor,
    choices: int,
    group: ProcessGroup | None = None,
    beside: tuple[Tensor, ...] = (),
) -> Tensor:
    """[N, H]: Σ over a token's choices of share · (down_e · squared_relu(up_e · x + b₁) + b₂), and up to two
    tensors `beside` [N, H], with one rounding of the whole sum.

    C = N · choices; choice c is of token c // choices. `order_C` int64 sorts the choices by expert,
    `inverse_C` is its inverse, `tokens_E` int64 the number of choices of each expert. Shares are fp32. Biases
    are flat, [experts · W] and [experts · H], both or none.

    With a `group` of R ranks, which all call it, the choices are those of all their tokens, C = R · N ·
    choices. The order ends in those that are of no expert here; `tokens_E` does not count them. Nothing may
    be `beside` them, as it would be added by each rank.

    Raises ValueError for widths without a kernel.
    """
    _, width, hidden = up_EWH.shape
    if width not in (16, 32, 64, 128):
        raise ValueError(f"the experts' width is {width}; a GPU's kernels take 16, 32, 64 or 128.")
    if hidden % 64:
        raise ValueError(f"the hidden width is {hidden}; the experts on a GPU take multiples of 64.")
    assert group is None or not beside, "each rank would add what is beside"
    out: Tensor = _Mixture.apply(  # type: ignore[no-untyped-call]
        x_NH,
        share_C,
        up_EWH,
        down_EHW,
        up_bias,
        down_bias,
        order_C,
        inverse_C,
        tokens_E,
        choices,
        group,
        *beside,
    )
    return out


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NH: Tensor,
        share_C: Tensor,
        up_EWH: Tensor,
        down_EHW: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        order_C: Tensor,
        inverse_C: Tensor,
        tokens_E: Tensor,
        choices: int,
        group: ProcessGroup | None,
        *beside: Tensor,
    ) -> Tensor:
        own_NH, share_C = x_NH.contiguous(), share_C.contiguous()
        ends_E, tiles = _tiles_of(tokens_E, len(order_C))
        ctx.choices, ctx.group, ctx.beside = choices, group, len(beside)
        x_NH = own_NH if group is None else all_gather(own_NH, group)
        inner_CW, act_CW = _up(x_NH, share_C, up_EWH, up_bias, order_C, choices, ends_E, tiles)
        del x_NH
        ctx.save_for_backward(
            own_NH,
            share_C,
            up_EWH,
            down_EHW,
            up_bias,
            down_bias,
            order_C,
            inverse_C,
            ends_E,
            tiles,
            inner_CW,
        )
        rows_CH = _rows(act_CW, down_EHW.transpose(1, 2), down_bias, share_C, order_C, ends_E, tiles)
        if group is None:
            return sum_of_rows(rows_CH, inverse_C, choices, beside)
        sums_NH = sum_of_rows(rows_CH, inverse_C, choices, ends_E=ends_E)
        del rows_CH, act_CW
        return reduce_scatter(sums_NH, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor | None, ...]:
        x_NH, share_C, up, down, up_bias, down_bias, order_C, inverse_C, ends_E, tiles, inner_CW = (
            ctx.saved_tensors
        )
        grad_out = grad_NH = grad_NH.contiguous()
        group: ProcessGroup | None = ctx.group
        gathering: Work | None = None
        if group is not None:
            grad_NH = all_gather(grad_NH, group)
            x_NH, gathering = start_all_gather(x_NH, group)
        of_choices = (order_C, ctx.choices, ends_E, tiles, inner_CW)
        grad_inner, grad_share, act_CW, side = _down_gradient(
            grad_NH, share_C, down, down_bias, *of_choices, whole=group is None
        )
        if gathering is not None:
            gathering.wait()
        sorted_by = (order_C, ctx.choices, ends_E)
        of_down = _weight_gradient(grad_NH, act_CW, side, *sorted_by, down, down_bias, up=False)
        del act_CW, side, grad_NH
        of_up = _weight_gradient(x_NH, grad_inner, None, *sorted_by, up, up_bias, up=True)
        del x_NH, gathering
        rows_CH = _rows(grad_inner, up, None, share_C, order_C, ends_E, tiles)
        grad_x = sum_of_rows(rows_CH, inverse_C, ctx.choices, ends_E=None if group is None else ends_E)
        del rows_CH
        if group is not None:
            grad_x = reduce_scatter(grad_x, group)
        of_weights = of_up[0], of_down[0], of_up[1], of_down[1]
        return grad_x, grad_share, *of_weights, *[None] * 5, *[grad_out] * ctx.beside


def _options(warps: int, stages: int) -> dict[str, int]:
    """Of a launch. A thread has as many registers as let two programs run on a multiprocessor at a time, so
    that one's loads and stores run beside the other's product."""
    return {"num_warps": warps, "num_stages": stages, "maxnreg": min(255, 1024 // warps)}


def _steps(size: int, most: int) -> int:
    """The largest step of 64 or `most` that divides `size`, a multiple of 64."""
    return most if size % most == 0 else 64


def _tiles_of(tokens_E: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(where the rows of each expert end [E], (expert, first row) of each tile [tiles, 2]) int32.

    There are as many tiles as these rows can need; the expert of those left over is −1.
    """
    experts = len(tokens_E)
    ends_E = torch.empty(experts, dtype=torch.int32, device=tokens_E.device)
    tiles = torch.empty(rows // ROWS + experts, 2, dtype=torch.int32, device=tokens_E.device)
    width = triton.next_power_of_2(experts)
    _make_tiles[(experts + 1,)](tokens_E, ends_E, tiles, len(tiles), experts, width, ROWS, num_warps=4)
    return ends_E, tiles


def _up(
    x_NH: Tensor,
    share_C: Tensor,
    up_EWH: Tensor,
    bias: Tensor | None,
    order_C: Tensor,
    choices: int,
    ends_E: Tensor,
    tiles: Tensor,
) -> tuple[Tensor, Tensor]:
    """([C, W] the first product with its bias, [C, W] what the second takes), sorted by expert."""
    _, width, hidden = up_EWH.shape
    inner_CW = x_NH.new_empty(len(order_C), width)
    act_CW = torch.empty_like(inner_CW)
    step, warps, stages = TILES["up"]
    _first_product[(len(tiles),)](
        x_NH,
        order_C,
        up_EWH,
        bias,
        share_C,
        tiles,
        ends_E,
        inner_CW,
        act_CW,
        choices,
        hidden,
        width,
        ROWS,
        _steps(hidden, step),
        **_options(warps, stages),
    )
    return inner_CW, act_CW


def _down_gradient(
    grad_NH: Tensor,
    share_C: Tensor,
    down_EHW: Tensor,
    bias: Tensor | None,
    order_C: Tensor,
    choices: int,
    ends_E: Tensor,
    tiles: Tensor,
    inner_CW: Tensor,
    *,
    whole: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(gradient of `inner`; of the shares, in the choices' own order; act again; with a bias the sorted
    shares in bf16 [C, SIDE]). `whole`: every choice has a row; the gradient of another's share is 0."""
    experts, hidden, width = down_EHW.shape
    grad_inner, act_CW = torch.empty_like(inner_CW), torch.empty_like(inner_CW)
    grad_share = torch.empty_like(share_C) if whole else torch.zeros_like(share_C)
    by_bias_NE = side = None
    if bias is not None:  # a share's gradient by its bias, of all experts: less than a pass over chosen rows
        by_bias_NE = grad_NH @ bias.view(experts, hidden).T
        side = inner_CW.new_empty(len(inner_CW), SIDE.value)
    step, warps, stages = TILES["down's gradient"]
    _second_product_backward[(len(tiles),)](
        grad_NH,
        order_C,
        down_EHW,
        by_bias_NE,
        share_C,
        tiles,
        ends_E,
        inner_CW,
        grad_inner,
        act_CW,
        grad_share,
        side,
        choices,
        experts,
        hidden,
        width,
        ROWS,
        _steps(hidden, step),
        **_options(warps, stages),
    )
    return grad_inner, grad_share, act_CW, side


def _rows(
    act_CW: Tensor,
    matrix_EWH: Tensor,
    bias: Tensor | None,
    share_C: Tensor,
    order_C: Tensor,
    ends_E: Tensor,
    tiles: Tensor,
) -> Tensor:
    """[C, H]: each row times its expert's matrix, which may be a transposed view, plus its share of the
    expert's bias."""
    _, width, hidden = matrix_EWH.shape
    out = act_CW.new_empty(len(act_CW), hidden)
    columns, warps, stages = TILES["rows"]
    _to_rows[(len(tiles),)](
        act_CW,
        order_C,
        matrix_EWH,
        bias,
        share_C,
        tiles,
        ends_E,
        out,
        *matrix_EWH.stride()[1:],
        hidden,
        width,
        ROWS,
        _steps(hidden, columns),
        **_options(warps, stages),
    )
    return out


def _weight_gradient(
    wide_NH: Tensor,
    narrow_CW: Tensor,
    side: Tensor | None,
    order_C: Tensor,
    choices: int,
    ends_E: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    up: bool,
) -> tuple[Tensor, Tensor | None]:
    """What the backward returns for a weight, [E, W, H] if `up`, else [E, H, W], and its bias.

    The gradient of up's bias is the sum of the narrow rows, that of down's the sum of the wide rows times
    `side`, the shares.
    """
    hidden, width = wide_NH.shape[1], narrow_CW.shape[1]
    target, returned = _target(weight)
    bias_target, bias_returned = (None, None) if bias is None else _target(bias)
    rows, columns, warps, stages = TILES["weights"]
    columns = _steps(hidden, columns)
    _sums_over_rows[(hidden // columns, len(ends_E))](
        wide_NH,
        narrow_CW,
        side,
        order_C,
        ends_E,
        target,
        getattr(weight, "empty_main_grad", None),
        bias_target,
        choices,
        hidden,
        width,
        rows,
        columns,
        up,
        target is not returned,
        bias_target is not bias_returned,
        **_options(warps, stages),
    )
    return returned, bias_returned


def _target(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(tensor for a parameter's gradient, what the backward returns): the same unless it has a buffer, to
    which the gradient is added."""
    buffers: list[Tensor] = []
    returned = add_to_main_gradient(weight, buffers.append)
    if returned is not None:
        return buffers[0], returned
    gradient = torch.empty_like(weight)
    return gradient, gradient


@triton.jit(do_not_specialize=["bound"])  # type: ignore[untyped-decorator]
def _make_tiles(  # type: ignore[no-untyped-def]
    tokens, ends, tiles, bound, EXPERTS: tl.constexpr, E: tl.constexpr, T: tl.constexpr
):
    """A program an expert, and one for the tiles left over. E: the smallest power of 2 that is not below
    EXPERTS."""
    own = tl.program_id(0)
    e = tl.arange(0, E)
    rows = tl.load(tokens + e, mask=e < EXPERTS, other=0).to(tl.int32)
    needed = (rows + T - 1) // T
    first_row = tl.sum(tl.where(e < own, rows, 0), 0)
    first = tl.sum(tl.where(e < own, needed, 0), 0)
    last = tl.where(own < EXPERTS, first + tl.sum(tl.where(e == own, needed, 0), 0), bound)
    tl.store(ends + own, first_row + tl.sum(tl.where(e == own, rows, 0), 0), mask=own < EXPERTS)
    for start in range(first, last, 128):
        tile = start + tl.arange(0, 128)
        tl.store(tiles + 2 * tile, tl.where(own < EXPERTS, own, -1) + 0 * tile, mask=tile < last)
        tl.store(tiles + 2 * tile + 1, first_row + (tile - first) * T, mask=tile < last)


@triton.jit  # type: ignore[untyped-decorator]
def _gathered_product(  # type: ignore[no-untyped-def]
    wide,
    token,
    matrix,
    H: tl.constexpr,
    W: tl.constexpr,
    T: tl.constexpr,
    B: tl.constexpr,
    BY_HIDDEN: tl.constexpr,
    BY_WIDTH: tl.constexpr,
):
    """[T, W] fp32: these tokens' rows of `wide` [N, H] times a matrix [H, W] with these strides."""
    h = tl.arange(0, B)
    left = wide + token[:, None] * H + h[None, :]
    right = matrix + h[:, None] * BY_HIDDEN + tl.arange(0, W)[None, :] * BY_WIDTH
    total = tl.zeros((T, W), tl.float32)
    for start in range(0, H, B):
        total = tl.dot(tl.load(left + start), tl.load(right + start * BY_HIDDEN), total)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _first_product(  # type: ignore[no-untyped-def]
    x,
    order,
    up,
    bias,
    share,
    tiles,
    ends,
    inner,
    act,
    K: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    T: tl.constexpr,
    B: tl.constexpr,
):
    """K: choices of a token. Rows after the expert's last are that row again, and not stored."""
    expert = tl.load(tiles + 2 * tl.program_id(0))
    if expert < 0:
        return
    row = tl.load(tiles + 2 * tl.program_id(0) + 1) + tl.arange(0, T)
    end = tl.load(ends + expert)
    choice = tl.load(order + tl.minimum(row, end - 1))
    total = _gathered_product(x, choice // K, up + expert.to(tl.int64) * W * H, H, W, T, B, 1, H)
    column = tl.arange(0, W)
    if bias is not None:
        total += tl.load(bias + expert * W + column).to(tl.float32)[None, :]
    rounded = total.to(inner.dtype.element_ty)  # what the backward reads
    place = row.to(tl.int64)[:, None] * W + column[None, :]
    inside = (row < end)[:, None]
    tl.store(inner + place, rounded, mask=inside)
    positive = tl.maximum(rounded.to(tl.float32), 0.0)
    value = positive * positive * tl.load(share + choice)[:, None]
    tl.store(act + place, value.to(act.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _second_product_backward(  # type: ignore[no-untyped-def]
    grad,
    order,
    down,
    by_bias,
    share,
    tiles,
    ends,
    inner,
    grad_inner,
    act,
    grad_share,
    side,
    K: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    T: tl.constexpr,
    B: tl.constexpr,
):
    """`by_bias` [N, E]: a token's gradient times each expert's bias. Else as in _first_product."""
    expert = tl.load(tiles + 2 * tl.program_id(0))
    if expert < 0:
        return
    row = tl.load(tiles + 2 * tl.program_id(0) + 1) + tl.arange(0, T)
    end = tl.load(ends + expert)
    choice = tl.load(order + tl.minimum(row, end - 1))
    token = choice // K
    d = _gathered_product(grad, token, down + expert.to(tl.int64) * H * W, H, W, T, B, W, 1)
    own = tl.load(share + choice)
    inside = row < end
    row = row.to(tl.int64)
    by_share = tl.zeros((T,), tl.float32)
    if by_bias is not None:
        by_share += tl.load(by_bias + token * E + expert).to(tl.float32)
    # one half of the columns after the other: fewer registers
    halves = tl.split(tl.permute(tl.reshape(d, (T, 2, W // 2)), (0, 2, 1)))
    for half in tl.static_range(2):
        place = row[:, None] * W + (half * (W // 2) + tl.arange(0, W // 2))[None, :]
        positive = tl.load(inner + place, mask=inside[:, None], other=0.0).to(tl.float32)
        positive = tl.maximum(positive, 0.0)
        d = halves[half]
        by_share += tl.sum(d * positive * positive, 1)
        value = positive * positive * own[:, None]
        tl.store(act + place, value.to(act.dtype.element_ty), mask=inside[:, None])
        d = d * (2 * positive * own[:, None])
        tl.store(grad_inner + place, d.to(grad_inner.dtype.element_ty), mask=inside[:, None])
    tl.store(grad_share + choice, by_share, mask=inside)
    if side is not None:
        beside = row[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
        value = tl.broadcast_to(own[:, None], (T, SIDE))
        tl.store(side + beside, value.to(side.dtype.element_ty), mask=inside[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _to_rows(  # type: ignore[no-untyped-def]
    act,
    order,
    matrix,
    bias,
    share,
    tiles,
    ends,
    out,
    BY_WIDTH: tl.constexpr,
    BY_HIDDEN: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    T: tl.constexpr,
    B: tl.constexpr,
):
    """The matrix is [E, W, H] with these strides."""
    expert = tl.load(tiles + 2 * tl.program_id(0))
    if expert < 0:
        return
    row = tl.load(tiles + 2 * tl.program_id(0) + 1) + tl.arange(0, T)
    end = tl.load(ends + expert)
    inside = (row < end)[:, None]
    read = tl.minimum(row, end - 1)
    w = tl.arange(0, W)
    h = tl.arange(0, B)
    left = tl.load(act + read.to(tl.int64)[:, None] * W + w[None, :])
    right = matrix + expert.to(tl.int64) * H * W + w[:, None] * BY_WIDTH + h[None, :] * BY_HIDDEN
    place = out + row.to(tl.int64)[:, None] * H + h[None, :]
    if bias is not None:
        own = tl.load(share + tl.load(order + read))
    for start in range(0, H, B):
        value = tl.dot(left, tl.load(right + start * BY_HIDDEN))
        if bias is not None:
            beside = tl.load(bias + expert * H + start + h).to(tl.float32)
            value += own[:, None] * beside[None, :]
        tl.store(place + start, value.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _sums_over_rows(  # type: ignore[no-untyped-def]
    wide,
    narrow,
    side,
    order,
    ends,
    target,
    empty,
    bias,
    K: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    UP: tl.constexpr,
    ADD: tl.constexpr,
    ADD_BIAS: tl.constexpr,
):
    """B of an expert's H: narrowᵀ · wide [W, H] if UP, else wideᵀ · narrow [H, W], over the expert's rows.
    ADD: to what is there, unless `empty` is 1."""
    part = tl.program_id(0)
    expert = tl.program_id(1)
    begin = tl.where(expert > 0, tl.load(ends + tl.maximum(expert - 1, 0)), 0)
    end = tl.load(ends + expert)
    w = tl.arange(0, W)
    h = part * B + tl.arange(0, B)
    s = tl.arange(0, SIDE)
    if UP:
        total = tl.zeros((W, B), tl.float32)
        by_side = tl.zeros((W, SIDE), tl.float32)
    else:
        total = tl.zeros((B, W), tl.float32)
        by_side = tl.zeros((B, SIDE), tl.float32)
    ones = tl.full((R, SIDE), 1.0, narrow.dtype.element_ty)
    for start in range(begin, end, R):
        row = start + tl.arange(0, R)
        inside = (row < end)[:, None]
        row = tl.minimum(row, end - 1)
        token = tl.load(order + row) // K
        of_tokens = tl.load(wide + token[:, None] * H + h[None, :])
        row = row.to(tl.int64)[:, None]
        of_rows = tl.load(narrow + row * W + w[None, :], mask=inside, other=0.0)
        if UP:
            of_rows = tl.trans(of_rows)
            total = tl.dot(of_rows, of_tokens, total)
            if bias is not None:
                by_side = tl.dot(of_rows, ones, by_side)
        else:
            of_tokens = tl.trans(of_tokens)
            total = tl.dot(of_tokens, of_rows, total)
            if bias is not None:
                beside = tl.load(side + row * SIDE + s[None, :], mask=inside, other=0.0)
                by_side = tl.dot(of_tokens, beside, by_side)
    target += expert.to(tl.int64) * H * W
    first: tl.constexpr = W if UP else B
    second: tl.constexpr = B if UP else W
    row = tl.arange(0, first)[:, None] * H if UP else h[:, None] * W
    # one half of the columns after the other: fewer registers
    halves = tl.split(tl.permute(tl.reshape(total, (first, 2, second // 2)), (0, 2, 1)))
    for half in tl.static_range(2):
        column = (part * B if UP else 0) + half * (second // 2) + tl.arange(0, second // 2)
        place = target + row + column[None, :]
        value = halves[half]
        if ADD:
            if empty is None:
                value += tl.load(place)
            else:
                value += tl.load(place, mask=tl.load(empty) == 0, other=0.0)
        tl.store(place, value.to(target.dtype.element_ty))
    if bias is not None:
        own = part < (1 if UP else H)  # up's is the same in every part
        by_bias = tl.sum(tl.where(s[None, :] == 0, by_side, 0.0), 1)
        beside = bias + (expert * W + w if UP else expert * H + h)
        if ADD_BIAS:
            by_bias += tl.load(beside, mask=own, other=0.0)
        tl.store(beside, by_bias.to(bias.dtype.element_ty), mask=own)
