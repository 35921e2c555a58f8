"""Triton kernels over a chunk of the student's and the teacher's logits: each logit is written and read once.

The products (vpmoe/model/kernels.py) sum exponentials while they have a tile. One pass then forms the
gradient, which overwrites the teacher's logits, and the KL. The student's logits are fp16, the finest of the
usual 16-bit types (2⁻¹¹ of a number): rounding them changes less than rounding the gradient. The teacher's
are bf16, as the teacher computes them. All sums are of rounded logits, so that probabilities add up to 1. All
exponents are in powers of two. teacher_forced_head.py has the formulas and computes them in torch on the CPU.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from vpmoe.model import kernels
from vpmoe.model.kernels import LN_2, LOG2_E

if TYPE_CHECKING:
    from vpmoe.api.stages import LossWeights

BLOCK = 2048
"""Logits of student and of teacher that a program holds at once."""
SPARE = 384
"""Rows of memory beyond a chunk's, at least those of a product's tile. The student's logits of a part of the
chunk lie behind the teacher's, where the teacher's next ones will be; only the last part needs rows of its
own. Fewer rows make short parts, whose products read a whole matrix for little work."""


def longest(rows: int) -> int:
    """Rows of the longest chunk whose logits, student's and teacher's, are in `rows` rows of memory."""
    return rows - SPARE


def compare(
    hidden_tH: Tensor,
    output_VH: Tensor,
    teacher_tG: Tensor,
    teacher_VG: Tensor,
    targets_t: Tensor,
    share_t: Tensor,
    terms: "LossWeights",
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p of the targets [t], KL(teacher‖student) at the terms' temperature [t], gradient of the loss with
    respect to the student's logits [t, V] in bf16)."""
    rows, width = len(hidden_tH), len(output_VH)
    blocks = triton.cdiv(width, BLOCK)
    logits_sV = kernels.logits_like(rows + min(SPARE, rows), output_VH, torch.bfloat16)
    reference_t, lse_t, soft_t, soft_teacher_t, logp_t = (torch.empty_like(share_t) for _ in range(5))
    kl_tb = torch.empty(rows, blocks, dtype=torch.float32, device=share_t.device)
    kernels.target_logits(hidden_tH, output_VH, targets_t, reference_t)
    scale = LOG2_E.value / terms.temperature
    for start, stop in _parts(rows):
        here, part = stop - start, slice(start, stop)
        teacher_uV, student_uV = logits_sV[part], logits_sV[stop : stop + here].view(torch.float16)
        high_teacher_un, (sum_teacher_un,) = kernels.logits(
            teacher_tG[part], teacher_VG, teacher_uV, terms.temperature, plain=False
        )
        high_un, (sum_un, plain_un) = kernels.logits(
            hidden_tH[part], output_VH, student_uV, terms.temperature, plain=True
        )
        tiles = high_un.shape[1]
        lse_u, soft_u, soft_teacher_u = lse_t[part], soft_t[part], soft_teacher_t[part]
        _combine[(here,)](
            high_un,
            sum_un,
            plain_un,
            high_teacher_un,
            sum_teacher_un,
            reference_t[part],
            lse_u,
            soft_u,
            soft_teacher_u,
            logp_t[part],
            tiles,
            scale,
            triton.next_power_of_2(tiles),
            num_warps=4,
        )
        _gradient_[(here * blocks,)](
            student_uV,
            teacher_uV,
            targets_t[part],
            lse_u,
            soft_u,
            soft_teacher_u,
            share_t[part],
            kl_tb[part],
            width,
            logits_sV.stride(0),
            scale,
            terms.ce,
            terms.kl * terms.temperature,
            terms.temperature == 2,
            BLOCK,
            num_warps=4,
        )
        del high_un, sum_un, plain_un, high_teacher_un, sum_teacher_un  # or they are there beside the next
    return logp_t, kl_tb.sum(1), logits_sV[:rows]


def _parts(rows: int) -> Iterator[tuple[int, int]]:
    """(First row, row after the last) of the parts of a chunk: twice a part fits in what is left of it and
    SPARE. Products compute whole tiles, so all parts but the last are whole tiles."""
    start = 0
    while start < rows:
        left = rows - start
        stop = start + (left if left <= SPARE else (left + SPARE) // 2 // kernels.M * kernels.M)
        yield start, stop
        start = stop


@triton.jit  # type: ignore[untyped-decorator]
def _log_sum(high, total, row, tiles, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """log₂ Σ 2^(scale · logit) of a row from its tiles."""
    n = tl.arange(0, BLOCK)
    low = tl.load(high + row * tiles + n, mask=n < tiles, other=float("-inf")) * scale
    sums = tl.load(total + row * tiles + n, mask=n < tiles, other=0.0)
    most = tl.max(low, 0)
    return tl.log2(tl.sum(sums * tl.exp2(low - most), 0)) + most


@triton.jit  # type: ignore[untyped-decorator]
def _combine(  # type: ignore[no-untyped-def]
    high,
    total,
    plain,
    high_teacher,
    total_teacher,
    reference,
    lse,
    soft,
    soft_teacher,
    logp,
    tiles,
    scale,
    BLOCK: tl.constexpr,
):
    """log₂ Σ exp of the student's x, of x/T and of the teacher's y/T; log p of the target."""
    row = tl.program_id(0).to(tl.int64)
    found = _log_sum(high, plain, row, tiles, LOG2_E, BLOCK)
    tl.store(lse + row, found)
    tl.store(logp + row, (tl.load(reference + row) - found) * LN_2)
    tl.store(soft + row, _log_sum(high, total, row, tiles, scale, BLOCK))
    tl.store(soft_teacher + row, _log_sum(high_teacher, total_teacher, row, tiles, scale, BLOCK))


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_(  # type: ignore[no-untyped-def]
    logits,
    teacher,
    targets,
    lse,
    soft,
    soft_teacher,
    share,
    apart,
    width,
    pitch,
    scale,
    ce,
    kl,
    SQUARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """share · [ce·(softmax(x) − onehot) + kl·T·(softmax(x/T) − softmax(y/T))], over y; `kl` here is the
    term's weight times T. `apart` becomes each block's Σ p·(log p − log q). Successive programs have
    successive memory. SQUARE: see kernels._logits."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(logits + row * pitch + columns, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(teacher + row * pitch + columns, mask=inside, other=0.0).to(tl.float32)
    low = tl.load(lse + row)
    low_soft = tl.load(soft + row)
    log_q = x * scale - low_soft
    log_p = y * scale - tl.load(soft_teacher + row)
    q = tl.exp2(log_q)
    p = tl.exp2(log_p)
    hard = q * q * tl.exp2(2 * low_soft - low) if SQUARE else tl.exp2(x * LOG2_E - low)
    hard -= tl.where(columns == tl.load(targets + row), 1.0, 0.0)
    gradient = tl.load(share + row) * (ce * hard + kl * (q - p))
    tl.store(teacher + row * pitch + columns, gradient.to(teacher.dtype.element_ty), mask=inside)
    found = tl.sum(tl.where(inside, p * (log_p - log_q), 0.0), 0) * LN_2
    tl.store(apart + tl.program_id(0), found)


def cosine(student_tG: Tensor, teacher_tG: Tensor, factor_t: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """(Cosine [t], gradient of factor · cosine with respect to the student's [t, G], in the teacher's type),
    with lengths of at least `least`."""
    rows, width = teacher_tG.shape
    cosine_t, grad_tG = torch.empty_like(factor_t), torch.empty_like(teacher_tG)
    _cosine[(rows,)](
        student_tG,
        teacher_tG,
        factor_t,
        cosine_t,
        grad_tG,
        least,
        width,
        triton.next_power_of_2(width),
        num_warps=8,
    )
    return cosine_t, grad_tG


@triton.jit  # type: ignore[untyped-decorator]
def _cosine(  # type: ignore[no-untyped-def]
    student, teacher, factor, cosine, gradient, least, G: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < G
    u = tl.load(student + row * G + columns, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(teacher + row * G + columns, mask=inside, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(u * u, 0)), least)
    u /= length
    v /= tl.maximum(tl.sqrt(tl.sum(v * v, 0)), least)
    found = tl.sum(u * v, 0)
    tl.store(cosine + row, found)
    change = tl.load(factor + row) * (v - found * u) / length
    tl.store(gradient + row * G + columns, change.to(gradient.dtype.element_ty), mask=inside)
