"""The passes over a chunk of student's and teacher's logits on a GPU: each logit is read twice, and one bf16 gradient written.

forced_head.py holds the formulas, and does them in torch on the CPU; see kernels.py for why torch's own operations are not enough.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from vpmoe.api.stages import Loss

BLOCK = 2048
"""Logits of either that a program holds at once."""
LOW = tl.constexpr(-1e30)
"""Stands where there is no logit. Finite, so that a lane that has seen nothing else holds numbers, which the last reduction makes 0."""


def compare_(logits_tV: Tensor, teacher_tV: Tensor, targets_t: Tensor, share_t: Tensor, terms: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """(log p of the targets [t], KL(teacher‖student) at the terms' temperature [t], gradient of the loss with respect to logits [t, V]).

    The gradient is written over `teacher_tV` and is in its type.
    """
    rows, width = logits_tV.shape
    found_5t = torch.empty(5, rows, dtype=torch.float32, device=logits_tV.device)
    lse_t, soft_t, soft_teacher_t, logp_t, kl_t = found_5t
    inverse = 1.0 / terms.temperature
    _measure[(rows,)](
        logits_tV, teacher_tV, targets_t, lse_t, soft_t, soft_teacher_t, logp_t, kl_t, width, inverse, BLOCK=BLOCK, num_warps=8
    )
    _gradient_[(rows, triton.cdiv(width, BLOCK))](
        logits_tV, teacher_tV, targets_t, lse_t, soft_t, soft_teacher_t, share_t, width, inverse, terms.ce, terms.kl * terms.temperature,
        BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return logp_t, kl_t, teacher_tV


@triton.jit  # type: ignore[untyped-decorator]
def _measure(  # type: ignore[no-untyped-def]
    logits, teacher, targets, lse, soft, soft_teacher, logp, kl, width, inverse, BLOCK: tl.constexpr
):
    """log Σ exp of x, x/T and y/T, and Σ p·(y − x)/T, in one reading of the student's x and the teacher's y; lane by lane until the end."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    high_x = tl.full((BLOCK,), LOW, tl.float32)
    high_y = tl.full((BLOCK,), LOW, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    total_x = tl.zeros((BLOCK,), tl.float32)
    total_y = tl.zeros((BLOCK,), tl.float32)
    apart = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + columns < width
        x = tl.load(logits + row * width + start + columns, mask=inside, other=LOW).to(tl.float32)
        y = tl.load(teacher + row * width + start + columns, mask=inside, other=LOW).to(tl.float32)
        above_x = tl.maximum(high_x, x)
        above_y = tl.maximum(high_y, y)
        total = total * tl.exp(high_x - above_x) + tl.exp(x - above_x)
        total_x = total_x * tl.exp((high_x - above_x) * inverse) + tl.exp((x - above_x) * inverse)
        shrunk = tl.exp((high_y - above_y) * inverse)
        p = tl.exp((y - above_y) * inverse)
        total_y = total_y * shrunk + p
        apart = apart * shrunk + p * (y - x)
        high_x = above_x
        high_y = above_y
    top_x = tl.max(high_x, 0)
    top_y = tl.max(high_y, 0)
    lse_x = top_x + tl.log(tl.sum(total * tl.exp(high_x - top_x), 0))
    soft_x = top_x * inverse + tl.log(tl.sum(total_x * tl.exp((high_x - top_x) * inverse), 0))
    shrunk = tl.exp((high_y - top_y) * inverse)
    mass = tl.sum(total_y * shrunk, 0)
    soft_y = top_y * inverse + tl.log(mass)
    tl.store(lse + row, lse_x)
    tl.store(soft + row, soft_x)
    tl.store(soft_teacher + row, soft_y)
    tl.store(logp + row, tl.load(logits + row * width + tl.load(targets + row)) - lse_x)
    tl.store(kl + row, tl.sum(apart * shrunk, 0) / mass * inverse + soft_x - soft_y)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_(  # type: ignore[no-untyped-def]
    logits, teacher, targets, lse, soft, soft_teacher, share, width, inverse, ce, kl, BLOCK: tl.constexpr
):
    """share · [ce·(softmax(x) − onehot) + kl·T·(softmax(x/T) − softmax(y/T))], over y; `kl` here is the term's weight times T."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(logits + row * width + columns, mask=inside, other=0.0)
    y = tl.load(teacher + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    onehot = tl.where(columns == tl.load(targets + row), 1.0, 0.0)
    hard = tl.exp(x - tl.load(lse + row)) - onehot
    soft_gap = tl.exp(x * inverse - tl.load(soft + row)) - tl.exp(y * inverse - tl.load(soft_teacher + row))
    gradient = tl.load(share + row) * (ce * hard + kl * soft_gap)
    tl.store(teacher + row * width + columns, gradient.to(teacher.dtype.element_ty), mask=inside)
