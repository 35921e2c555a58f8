"""Embeddings on a GPU: the backward adds to the rows of the tokens that occur, and to no others.

torch's writes a gradient as large as the whole matrix, most of it zeros, and megatron adds all of it to the
fp32 buffer. Here positions are sorted by token, a program sums the gradients of one token after another in
fp32, in the order of the positions, and adds to the token's row. No atomic additions, so results are the same
in each call.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpmoe.model.main_gradient import add_to_main_gradient

PLACES = 8
"""Sorted positions of a program: it sums the tokens whose first position is one of them."""
ROWS, COLUMNS = 16, 256
"""Gradients that a program holds at a time: positions and hidden components."""


def embedding(tokens: Tensor, weight_VH: Tensor) -> Tensor:
    """Rows of `weight_VH` of the tokens […]: […, H]."""
    out: Tensor = _Embedding.apply(tokens, weight_VH)  # type: ignore[no-untyped-call]
    return out


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight_VH: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight_VH)
        return torch.nn.functional.embedding(tokens, weight_VH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        tokens, weight_VH = ctx.saved_tensors
        tokens_N = tokens.reshape(-1)
        gradient_NH = gradient.reshape(len(tokens_N), -1).contiguous()
        added = add_to_main_gradient(weight_VH, lambda main_VH: add_rows_(main_VH, tokens_N, gradient_NH))
        if added is not None:
            return None, added
        total_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        add_rows_(total_VH, tokens_N, gradient_NH)
        return None, total_VH.to(weight_VH.dtype)


def add_rows_(sum_VH: Tensor, tokens_N: Tensor, rows_NH: Tensor) -> None:
    """sum[tokens[n]] += rows[n], in the order of n, with sums in fp32."""
    sorted_N, place_N = tokens_N.sort(stable=True)
    count, width = rows_NH.shape
    grid = (triton.cdiv(count, PLACES), triton.cdiv(width, COLUMNS))
    _add_rows[grid](sum_VH, sorted_N, place_N, rows_NH, count, width, PLACES, ROWS, COLUMNS, num_warps=4)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _add_rows(  # type: ignore[no-untyped-def]
    sums,
    tokens,
    places,
    rows,
    count,
    W: tl.constexpr,
    PLACES: tl.constexpr,
    T: tl.constexpr,
    B: tl.constexpr,
):
    column = tl.program_id(1) * B + tl.arange(0, B)
    within = column < W
    for i in range(PLACES):
        first = tl.program_id(0) * PLACES + i
        token = tl.load(tokens + first, mask=first < count, other=-1)
        before = tl.load(tokens + first - 1, mask=(first > 0) & (first < count), other=-1)
        if token != before:  # and not beyond the last position, where both are −1
            total = tl.zeros((T, B), tl.float32)
            start = first
            more = True
            while more:
                place = start + tl.arange(0, T)
                same = tl.load(tokens + place, mask=place < count, other=-1) == token
                row = tl.load(places + place, mask=same, other=0)
                total += tl.load(
                    rows + row[:, None] * W + column[None, :],
                    mask=same[:, None] & within[None, :],
                    other=0.0,
                ).to(tl.float32)
                start += T
                more = tl.sum(same.to(tl.int32), 0) == T
            target = sums + token * W + column
            tl.store(target, tl.load(target, mask=within, other=0.0) + tl.sum(total, 0), mask=within)
