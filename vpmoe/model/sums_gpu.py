"""Gradients of vectors on a GPU, biases and norms' weights: sums over rows, in two kernels.

Many programs of a first kernel each sum some rows; `column_sums` is one, and the kernels of other modules do
it beside their own work. The kernel of `gradient_of_vector` adds the programs' sums. Sums are fp32. No atomic
additions, so results are the same in each call.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from vpmoe.model.main_gradient import add_to_main_gradient

ROWS, COLUMNS, STEPS = 32, 128, 8
"""Rows and columns that a program of `column_sums` holds at a time, and how often it does."""
TOTAL = (128, 8)
"""Rows and columns that a program of the last sum holds at a time."""


def column_sums(x_NW: Tensor) -> Tensor:
    """[programs, W] fp32, for `gradient_of_vector`: sums of the rows of `x_NW`, some rows a program."""
    x_NW = x_NW.contiguous()
    rows, width = x_NW.shape
    programs = triton.cdiv(rows, ROWS * STEPS)
    sums_PW = torch.empty(programs, width, dtype=torch.float32, device=x_NW.device)
    _column_sums[(programs, triton.cdiv(width, COLUMNS))](
        x_NW, sums_PW, rows, width, ROWS, COLUMNS, STEPS, num_warps=4
    )
    return sums_PW


def gradient_of_vector(vector_W: Tensor, sums_PW: Tensor) -> Tensor:
    """What a backward returns as the gradient of a parameter [W]: Σ over the rows of `sums_PW` (fp32,
    at least one row, contiguous in itself). Added to the parameter's fp32 buffer if it has one, as in
    add_to_main_gradient."""
    added = add_to_main_gradient(vector_W, lambda main_W: _total_of(sums_PW, main_W, add=True))
    if added is not None:
        return added
    total_W = torch.empty_like(vector_W)
    _total_of(sums_PW, total_W, add=False)
    return total_W


def _total_of(sums_PW: Tensor, out_W: Tensor, *, add: bool) -> None:
    rows, width = sums_PW.shape
    _total[(triton.cdiv(width, TOTAL[1]),)](
        sums_PW, out_W, rows, sums_PW.stride(0), width, add, *TOTAL, num_warps=4
    )


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _column_sums(  # type: ignore[no-untyped-def]
    x, sums, rows, W: tl.constexpr, T: tl.constexpr, B: tl.constexpr, STEPS: tl.constexpr
):
    """`sums` [programs, W]: the sum of each program's T · STEPS rows."""
    column = tl.program_id(1) * B + tl.arange(0, B)
    total = tl.zeros((T, B), tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * T + tl.arange(0, T)
        inside = (row < rows)[:, None] & (column < W)[None, :]
        total += tl.load(x + row.to(tl.int64)[:, None] * W + column[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
    tl.store(sums + tl.program_id(0).to(tl.int64) * W + column, tl.sum(total, 0), mask=column < W)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _total(  # type: ignore[no-untyped-def]
    sums,
    out,
    rows,
    STRIDE: tl.constexpr,
    W: tl.constexpr,
    ADD: tl.constexpr,
    T: tl.constexpr,
    B: tl.constexpr,
):
    column = tl.program_id(0) * B + tl.arange(0, B)
    total = tl.zeros((T, B), tl.float32)
    for first in range(0, rows, T):
        row = first + tl.arange(0, T)
        inside = (row < rows)[:, None] & (column < W)[None, :]
        total += tl.load(sums + row.to(tl.int64)[:, None] * STRIDE + column[None, :], mask=inside, other=0.0)
    found = tl.sum(total, 0)
    if ADD:
        found += tl.load(out + column, mask=column < W, other=0.0)
    tl.store(out + column, found.to(out.dtype.element_ty), mask=column < W)
