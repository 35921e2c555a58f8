"""Triton kernels of the loss head: two passes over a chunk of logits, and log p alone in one product.

The two passes do everything between the head's matrix products and read each logit twice. torch's operations
would read and write [chunk, vocabulary] about ten times and take longer than the products. The product for
log p keeps its logits in registers. Triton compiles the kernels on first use and needs a C compiler. The
formulas, and their computation in torch on the CPU, are in head.py.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

BLOCK = 4096
"""Logits that a program holds at a time."""
TILE = (128, 256, 64)
"""Tokens, vocabulary and hidden size of a program's tile of a product."""
BAND = 8
"""Number of token tiles that use one vocabulary tile in succession, so that it is read from memory once."""


def log_sum_exp(logits_tV: Tensor, targets_t: Tensor) -> tuple[Tensor, Tensor]:
    """(log Σ exp of each row [t], log softmax at its target [t]) of fp32 logits, in fp32."""
    lse_t = torch.empty(len(logits_tV), dtype=torch.float32, device=logits_tV.device)
    logp_t = torch.empty_like(lse_t)
    _log_sum_exp[(len(logits_tV),)](
        logits_tV, targets_t, lse_t, logp_t, logits_tV.shape[1], BLOCK=BLOCK, num_warps=8
    )
    return lse_t, logp_t


def gradient(logits_tV: Tensor, targets_t: Tensor, lse_t: Tensor, c_t: Tensor, dtype: torch.dtype) -> Tensor:
    """c · (softmax − onehot) [t, V] in `dtype`: the gradient of −c·logp with respect to the logits."""
    grad_tV = torch.empty(logits_tV.shape, dtype=dtype, device=logits_tV.device)
    width = logits_tV.shape[1]
    _gradient[(len(logits_tV), triton.cdiv(width, BLOCK))](
        logits_tV, targets_t, lse_t, c_t, grad_tV, width, BLOCK=BLOCK, num_warps=8
    )
    return grad_tV


def logp(hidden_tH: Tensor, weight_VH: Tensor, targets_t: Tensor) -> Tensor:
    """log p of the targets [t] in fp32. Each tile stores the highest logit and Σ exp of its rows."""
    rows, width = len(hidden_tH), len(weight_VH)
    high_nt, total_nt = torch.empty(
        2, triton.cdiv(width, TILE[1]), rows, dtype=torch.float32, device=hidden_tH.device
    )
    _tile_sums[tiles(rows, width)](
        hidden_tH,
        weight_VH,
        high_nt,
        total_nt,
        rows,
        width,
        hidden_tH.shape[1],
        *TILE,
        BAND,
        num_warps=8,
        num_stages=3,
    )
    target_t = (hidden_tH.float() * weight_VH[targets_t].float()).sum(1)
    lse_t: Tensor = (high_nt + total_nt.log()).logsumexp(0)
    return target_t - lse_t


def tiles(rows: int, width: int) -> tuple[int]:
    """The launch grid of `product`: one program per tile."""
    return (triton.cdiv(rows, TILE[0]) * triton.cdiv(width, TILE[1]),)


@triton.jit  # type: ignore[untyped-decorator]
def product(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    rows,
    width,
    H: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BAND: tl.constexpr,
):
    """(logits [M, N] in fp32, rows [M], columns [N], number of the vocabulary tile) of this program's tile.

    Rows and columns beyond the last repeat the first ones.
    """
    across = tl.cdiv(width, N)
    band = tl.program_id(0) // (BAND * across)
    within = tl.program_id(0) % (BAND * across)
    high = tl.minimum(tl.cdiv(rows, M) - band * BAND, BAND)
    tile = within // high
    row = (band * BAND + within % high) * M + tl.arange(0, M)
    column = tile * N + tl.arange(0, N)
    inner = tl.arange(0, K)
    left = hidden + (row % rows).to(tl.int64)[:, None] * H + inner[None, :]
    right = weight + (column % width).to(tl.int64)[None, :] * H + inner[:, None]
    logits = tl.zeros((M, N), tl.float32)
    for start in range(0, H, K):
        if H % K == 0:
            logits = tl.dot(tl.load(left), tl.load(right), logits)
        else:
            inside = start + inner < H
            logits = tl.dot(
                tl.load(left, mask=inside[None, :], other=0.0),
                tl.load(right, mask=inside[:, None], other=0.0),
                logits,
            )
        left += K
        right += K
    return logits, row, column, tile


@triton.jit  # type: ignore[untyped-decorator]
def _tile_sums(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    high,
    total,
    rows,
    width,
    H: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BAND: tl.constexpr,
):
    x, row, column, tile = product(hidden, weight, rows, width, H, M, N, K, BAND)
    x = tl.where((column < width)[None, :], x, -1e30)
    top = tl.max(x, 1)
    tl.store(high + tile * rows + row, top, mask=row < rows)
    tl.store(total + tile * rows + row, tl.sum(tl.exp(x - top[:, None]), 1), mask=row < rows)


@triton.jit  # type: ignore[untyped-decorator]
def _log_sum_exp(logits, targets, lse, logp, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    # Each lane has its own running sum: one reduction over lanes at the end instead of one per block.
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        x = tl.load(logits + row * width + start + columns, mask=start + columns < width, other=float("-inf"))
        above = tl.maximum(highest, x)
        # A lane that has seen only masked columns holds −inf, and −inf − −inf is NaN.
        total = tl.where(above == float("-inf"), 0.0, total * tl.exp(highest - above) + tl.exp(x - above))
        highest = above
    top = tl.max(highest, 0)
    result = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
    tl.store(lse + row, result)
    tl.store(logp + row, tl.load(logits + row * width + tl.load(targets + row)) - result)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient(logits, targets, lse, c, grad, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(logits + row * width + columns, mask=inside, other=0.0)
    softmax = tl.exp(x - tl.load(lse + row))
    onehot = tl.where(columns == tl.load(targets + row), 1.0, 0.0)
    tl.store(
        grad + row * width + columns,
        (tl.load(c + row) * (softmax - onehot)).to(grad.dtype.element_ty),
        mask=inside,
    )
