"""Gradients of vectors on a GPU, biases and norms' weights: sums over rows, in two kernels.

Many programs of a first kernel each sum some rows; `column_sums` is one, and the kernels of other modules do
it beside their own work. The kernel of `gradients_of_vectors` adds the programs' sums. Sums are fp32. No
atomic additions, so results are the same in each call.
"""

from collections.abc import Sequence

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from vpmoe.model.main_gradient import add_to_main_gradient

ROWS, COLUMNS, STEPS = 32, 128, 8
"""Rows and columns that a program of `column_sums` holds at a time, and how often it does."""
TOTAL = (1024, 8, 8)
"""Rows and columns that a program of the last sum holds at a time, and its warps: most sums have no more
rows, so that all loads are in flight together."""
VECTORS = 3
"""Most vectors of a last sum."""


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
    return gradients_of_vectors((vector_W,), sums_PW)[0]


def gradients_of_vectors(vectors: Sequence[Tensor], sums_PW: Tensor) -> list[Tensor]:
    """`gradient_of_vector` of up to VECTORS parameters of one dtype, whose columns of `sums_PW` follow one
    another, in one kernel. Either all have buffers, or none."""
    returned, targets = [], []
    for vector in vectors:
        buffers: list[Tensor] = []
        added = add_to_main_gradient(vector, buffers.append)
        gradient = torch.empty_like(vector) if added is None else added
        returned.append(gradient)
        targets.append(gradient if added is None else buffers[0])
    rows, columns, warps = TOTAL
    count, width = sums_PW.shape
    widths = [len(vector) for vector in vectors] + [0] * (VECTORS - len(vectors))
    assert sum(widths) == width, "each column belongs to a vector"
    _total[(sum(triton.cdiv(width, columns) for width in widths),)](
        sums_PW,
        *targets + [None] * (VECTORS - len(vectors)),
        count,
        sums_PW.stride(0),
        *widths,
        targets[0] is not returned[0],
        rows,
        columns,
        num_warps=warps,
    )
    return returned


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


@triton.jit  # type: ignore[untyped-decorator]
def _total_of_columns(  # type: ignore[no-untyped-def]
    sums,
    out,
    block,
    rows,
    STRIDE: tl.constexpr,
    W: tl.constexpr,
    ADD: tl.constexpr,
    T: tl.constexpr,
    B: tl.constexpr,
):
    column = block * B + tl.arange(0, B)
    total = tl.zeros((T, B), tl.float32)
    for first in range(0, rows, T):
        row = first + tl.arange(0, T)
        inside = (row < rows)[:, None] & (column < W)[None, :]
        total += tl.load(sums + row.to(tl.int64)[:, None] * STRIDE + column[None, :], mask=inside, other=0.0)
    found = tl.sum(total, 0)
    if ADD:
        found += tl.load(out + column, mask=column < W, other=0.0)
    tl.store(out + column, found.to(out.dtype.element_ty), mask=column < W)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _total(  # type: ignore[no-untyped-def]
    sums,
    out_1,
    out_2,
    out_3,
    rows,
    STRIDE: tl.constexpr,
    W_1: tl.constexpr,
    W_2: tl.constexpr,
    W_3: tl.constexpr,
    ADD: tl.constexpr,
    T: tl.constexpr,
    B: tl.constexpr,
):
    """A program has B columns of one vector."""
    block = tl.program_id(0)
    END_1: tl.constexpr = (W_1 + B - 1) // B
    END_2: tl.constexpr = END_1 + (W_2 + B - 1) // B
    if block < END_1:
        _total_of_columns(sums, out_1, block, rows, STRIDE, W_1, ADD, T, B)
    elif block < END_2:
        if out_2 is not None:
            _total_of_columns(sums + W_1, out_2, block - END_1, rows, STRIDE, W_2, ADD, T, B)
    elif out_3 is not None:
        _total_of_columns(sums + W_1 + W_2, out_3, block - END_2, rows, STRIDE, W_3, ADD, T, B)
