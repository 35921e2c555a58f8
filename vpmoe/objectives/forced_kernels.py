"""The passes over a chunk of the teacher-forced head on a GPU. The student's logits never leave the processors: the product that makes them
is done twice, once for the sums over the vocabulary and once for the gradient, in less time than to write and read them in between.

The teacher's logits lie in memory, in bf16, are read twice, and the gradient takes their place. forced_head.py holds the formulas, and does
them in torch on the CPU; see kernels.py for why torch's own operations are not enough.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from vpmoe.api.stages import Loss
from vpmoe.objectives import kernels
from vpmoe.objectives.kernels import product

LAUNCH = {"num_warps": 8, "num_stages": 3}


def compare_(
    hidden_tH: Tensor, output_VH: Tensor, teacher_tV: Tensor, targets_t: Tensor, share_t: Tensor, terms: Loss
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p of the targets [t], KL(teacher‖student) at the terms' temperature [t], gradient of the loss with respect to logits [t, V]).

    The gradient is written over `teacher_tV` and is in its type.
    """
    rows, width = teacher_tV.shape
    inverse = 1.0 / terms.temperature
    sums_6nt = torch.empty(6, triton.cdiv(width, kernels.TILE[1]), rows, dtype=torch.float32, device=teacher_tV.device)
    shape = (rows, width, hidden_tH.shape[1], *kernels.TILE, kernels.BAND)
    _sums[kernels.tiles(rows, width)](hidden_tH, output_VH, teacher_tV, sums_6nt, sums_6nt[0].numel(), inverse, *shape, **LAUNCH)
    high_nt, total_nt, soft_nt, high_teacher_nt, teacher_nt, apart_nt = sums_6nt
    lse_t = (high_nt + total_nt.log()).logsumexp(0)
    soft_t = (high_nt * inverse + soft_nt.log()).logsumexp(0)
    soft_teacher_t = (high_teacher_nt * inverse + teacher_nt.log()).logsumexp(0)
    apart_t = (apart_nt * (high_teacher_nt * inverse - soft_teacher_t).exp()).sum(0)
    _gradient_[kernels.tiles(rows, width)](
        hidden_tH, output_VH, teacher_tV, targets_t, lse_t, soft_t, soft_teacher_t, share_t, inverse, terms.ce,
        terms.kl * terms.temperature, *shape, **LAUNCH,
    )  # fmt: skip
    logp_t = (hidden_tH.float() * output_VH[targets_t].float()).sum(1) - lse_t
    return logp_t, apart_t * inverse + soft_t - soft_teacher_t, teacher_tV


@triton.jit  # type: ignore[untyped-decorator]
def _sums(  # type: ignore[no-untyped-def]
    hidden, output, teacher, sums, each, inverse, rows, width, H: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BAND: tl.constexpr,
):  # fmt: skip
    """Of each row, x the student's logits and y the teacher's: max x, Σ exp(x), Σ exp(x/T), max y, Σ exp(y/T), Σ exp(y/T)·(y − x);
    each Σ with its maximum taken out."""
    x, row, column, tile = product(hidden, output, rows, width, H, M, N, K, BAND)
    inside = (column < width)[None, :]
    place = teacher + (row % rows).to(tl.int64)[:, None] * width + column[None, :]
    y = tl.load(place, mask=inside, other=-1e30).to(tl.float32)
    x = tl.where(inside, x, -1e30)
    high_x = tl.max(x, 1)
    high_y = tl.max(y, 1)
    p = tl.exp((y - high_y[:, None]) * inverse)
    out = sums + tile * rows + row
    tl.store(out, high_x, mask=row < rows)
    tl.store(out + each, tl.sum(tl.exp(x - high_x[:, None]), 1), mask=row < rows)
    tl.store(out + 2 * each, tl.sum(tl.exp((x - high_x[:, None]) * inverse), 1), mask=row < rows)
    tl.store(out + 3 * each, high_y, mask=row < rows)
    tl.store(out + 4 * each, tl.sum(p, 1), mask=row < rows)
    tl.store(out + 5 * each, tl.sum(p * (y - x), 1), mask=row < rows)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_(  # type: ignore[no-untyped-def]
    hidden, output, teacher, targets, lse, soft, soft_teacher, share, inverse, ce, kl, rows, width, H: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """share · [ce·(softmax(x) − onehot) + kl·T·(softmax(x/T) − softmax(y/T))], over y; `kl` here is the term's weight times T."""
    x, row, column, _ = product(hidden, output, rows, width, H, M, N, K, BAND)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    row = row % rows
    place = teacher + row.to(tl.int64)[:, None] * width + column[None, :]
    y = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    onehot = tl.where(column[None, :] == tl.load(targets + row)[:, None], 1.0, 0.0)
    hard = tl.exp(x - tl.load(lse + row)[:, None]) - onehot
    gap = tl.exp(x * inverse - tl.load(soft + row)[:, None]) - tl.exp(y * inverse - tl.load(soft_teacher + row)[:, None])
    gradient = tl.load(share + row)[:, None] * (ce * hard + kl * gap)
    tl.store(place, gradient.to(teacher.dtype.element_ty), mask=inside)
