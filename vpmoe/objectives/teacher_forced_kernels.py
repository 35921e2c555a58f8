"""Triton kernels over a chunk of the student's and the teacher's logits: each logit is read twice.

The student's logits are fp16, the finest of the usual 16-bit types (2⁻¹¹ of a number): rounding them changes
less than rounding the gradient. The teacher's are bf16, as the teacher computes them, and the bf16 gradient
overwrites them. teacher_forced_head.py has the formulas and computes them in torch on the CPU;
vpmoe/model/kernels.py says why torch's own operations are too slow.
"""

from typing import TYPE_CHECKING

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from vpmoe.model import kernels

if TYPE_CHECKING:
    from vpmoe.api.stages import LossWeights

BLOCK = 2048
"""Logits of student and of teacher that a program holds at once."""
PARTS = 2
"""Pieces of a chunk whose student's logits are in memory one after the other: products with the teacher's
matrix and with gradients want long chunks."""


def compare_(
    hidden_tH: Tensor,
    output_VH: Tensor,
    teacher_tV: Tensor,
    targets_t: Tensor,
    share_t: Tensor,
    terms: "LossWeights",
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p of the targets [t], KL(teacher‖student) at the terms' temperature [t], gradient of the loss with
    respect to logits [t, V]).

    The gradient is written over `teacher_tV` and is in its type.
    """
    rows, width = teacher_tV.shape
    each = -(-rows // PARTS)
    sums_4t = torch.empty(4, rows, dtype=torch.float32, device=teacher_tV.device)
    inverse = 1.0 / terms.temperature
    for start in range(0, rows, each):
        part = slice(start, start + each)
        hidden_uH, teacher_uV, (lse_u, soft_u, soft_teacher_u, kl_u) = (
            hidden_tH[part],
            teacher_tV[part],
            sums_4t[:, part],
        )
        here, logits_uV = len(hidden_uH), kernels.logits(hidden_uH, output_VH)
        _measure[(here,)](
            logits_uV,
            teacher_uV,
            lse_u,
            soft_u,
            soft_teacher_u,
            kl_u,
            width,
            logits_uV.stride(0),
            inverse,
            BLOCK=BLOCK,
            num_warps=4,
        )
        _gradient_[(here, triton.cdiv(width, BLOCK))](
            logits_uV,
            teacher_uV,
            targets_t[part],
            lse_u,
            soft_u,
            soft_teacher_u,
            share_t[part],
            width,
            logits_uV.stride(0),
            inverse,
            terms.ce,
            terms.kl * terms.temperature,
            BLOCK=BLOCK,
            num_warps=4,
        )
        del logits_uV  # or it would exist beside the next part's
    return (hidden_tH.float() * output_VH[targets_t].float()).sum(1) - sums_4t[0], sums_4t[3], teacher_tV


@triton.jit  # type: ignore[untyped-decorator]
def _measure(  # type: ignore[no-untyped-def]
    logits, teacher, lse, soft, soft_teacher, kl, width, pitch, inverse, BLOCK: tl.constexpr
):
    """Of the student's x and the teacher's y: log Σ exp of x, x/T and y/T, and KL = Σ p·(y − x)/T + log Σ
    exp(x/T) − log Σ exp(y/T)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    high_x = -1e30  # finite, so that −1e30 − −1e30 is a number
    high_y = -1e30
    total = tl.zeros((BLOCK,), tl.float32)
    total_x = tl.zeros((BLOCK,), tl.float32)
    total_y = tl.zeros((BLOCK,), tl.float32)
    apart = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + columns < width
        x = tl.load(logits + row * pitch + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        y = tl.load(teacher + row * width + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        above_x = tl.maximum(high_x, tl.max(x, 0))
        above_y = tl.maximum(high_y, tl.max(y, 0))
        if above_x > high_x:
            total *= tl.exp(high_x - above_x)
            total_x *= tl.exp((high_x - above_x) * inverse)
        if above_y > high_y:
            total_y *= tl.exp((high_y - above_y) * inverse)
            apart *= tl.exp((high_y - above_y) * inverse)
        p = tl.exp((y - above_y) * inverse)
        total += tl.exp(x - above_x)
        total_x += tl.exp((x - above_x) * inverse)
        total_y += p
        apart += tl.where(inside, p * (y - x), 0.0)
        high_x = above_x
        high_y = above_y
    soft_x = high_x * inverse + tl.log(tl.sum(total_x, 0))
    mass = tl.sum(total_y, 0)
    soft_y = high_y * inverse + tl.log(mass)
    tl.store(lse + row, high_x + tl.log(tl.sum(total, 0)))
    tl.store(soft + row, soft_x)
    tl.store(soft_teacher + row, soft_y)
    tl.store(kl + row, tl.sum(apart, 0) / mass * inverse + soft_x - soft_y)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_(  # type: ignore[no-untyped-def]
    logits,
    teacher,
    targets,
    lse,
    soft,
    soft_teacher,
    share,
    width,
    pitch,
    inverse,
    ce,
    kl,
    BLOCK: tl.constexpr,
):
    """share · [ce·(softmax(x) − onehot) + kl·T·(softmax(x/T) − softmax(y/T))], over y; `kl` here is the
    term's weight times T."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(logits + row * pitch + columns, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(teacher + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    onehot = tl.where(columns == tl.load(targets + row), 1.0, 0.0)
    hard = tl.exp(x - tl.load(lse + row)) - onehot
    gap = tl.exp(x * inverse - tl.load(soft + row)) - tl.exp(y * inverse - tl.load(soft_teacher + row))
    gradient = tl.load(share + row) * (ce * hard + kl * gap)
    tl.store(teacher + row * width + columns, gradient.to(teacher.dtype.element_ty), mask=inside)
