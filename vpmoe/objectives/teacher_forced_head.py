"""The head of teacher-forced training: cross-entropy, KL from the teacher and cosine of hidden states.

No tensor is ever [tokens, vocabulary]. As in vpmoe/model/head.py the gradients are formed in the forward,
chunk by chunk over tokens, and the backward only scales them. A chunk needs the student's logits and the
teacher's, which follow from the teacher's final hidden states and its own output matrix: four matrix products
in all. With p and q the teacher's and the student's distribution at temperature T, the gradient of T²·KL(p‖q)
= T²·Σ p·(log p − log q) with respect to the student's logits is T·(q − p). No gradient goes to the teacher.

Hidden states come from vpmoe/trainer/teacher_forced; the measures are summed in teacher_forced.py.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpmoe.model.head import (
    assert_final,
    chunk_logits,
    gradients_in_forward,
    target_chunks,
    unscored_logp,
)
from vpmoe.model.main_gradient import add_product_, in_main_gradient

if TYPE_CHECKING:
    from vpmoe.api.stages import LossWeights

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 960 << 20}
"""Bound on one chunk's logits: on a CPU of the teacher's, in fp32; on a GPU of both models' that are in
memory at a time, which is a chunk of 2,118 tokens at a vocabulary of 201,088. All else of it is 45 to 60 MiB
there. Shorter chunks would read and write the fp32 sum of the matrix's gradient more often (0.8 GiB at hidden
1,024)."""
EPSILON = 1e-8
"""Least length of a hidden state in the cosine, as in torch.nn.functional.cosine_similarity."""


class Teacher(NamedTuple):
    """What the student is compared with: no gradient, never logits."""

    hidden_TG: Tensor
    """The teacher's final hidden states at the batch's positions, G wide."""
    output_VG: Tensor
    """The matrix from hidden states to the teacher's logits."""


class Forced(NamedTuple):
    """Result of a microbatch. All but the loss are measures only, NaN without a target."""

    loss: Tensor
    """Σ share · [ce · nll + kl · T² · KL + hidden · (1 − cosine)]"""
    logp_T: Tensor
    """log p of the targets, at temperature 1."""
    kl_T: Tensor
    """KL(teacher‖student) at temperature T, in nats, without the T²."""
    cosine_T: Tensor
    """Cosine of the projected student's hidden state and the teacher's."""


def forced_loss(
    hidden_TH: Tensor,
    output_VH: Tensor,
    projection_GH: Tensor | None,
    teacher: Teacher,
    targets_T: Tensor,
    share_T: Tensor,
    terms: "LossWeights",
    rows_N: Tensor | None = None,
    *,
    final: bool = False,
) -> Forced:
    """The loss of one microbatch, differentiable in hidden, output and projection. Positions
    whose target is NO_TARGET add nothing.

    `share_T` is each token's weight, w_span / N_span. `projection_GH` brings the student's hidden states to
    the teacher's width; None if both have the same width. `rows_N` and `final` are those of head.head_loss,
    `final` for both matrices. On the GPU all inputs are bf16 and sums are fp32 (logits: see
    teacher_forced_kernels.py). Elsewhere everything has the type of hidden. Raises ValueError if a projection
    is missing.
    """
    if projection_GH is None and hidden_TH.shape[1] != teacher.hidden_TG.shape[1]:
        raise ValueError(
            f"hidden states are {hidden_TH.shape[1]} wide, the teacher's {teacher.hidden_TG.shape[1]}: a "
            "projection is missing."
        )
    mains = tuple(
        gradients_in_forward(matrix) if final and matrix is not None else None
        for matrix in (output_VH, projection_GH)
    )
    found = _Head.apply(  # type: ignore[no-untyped-call]
        hidden_TH, output_VH, projection_GH, teacher, targets_T, share_T, terms, rows_N, *mains
    )
    return Forced(*found)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        output_VH: Tensor,
        projection_GH: Tensor | None,
        teacher: Teacher,
        targets_T: Tensor,
        share_T: Tensor,
        terms: "LossWeights",
        rows_N: Tensor | None,
        main_VH: Tensor | None,
        main_GH: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logp_T, kl_T, cosine_T = (unscored_logp(hidden_TH) for _ in range(3))
        loss = logp_T.new_zeros(())
        grad_hidden_TH = torch.zeros_like(hidden_TH)
        grad_output_VH, grad_projection_GH = (
            torch.zeros_like(matrix, dtype=logp_T.dtype) if main is None and matrix is not None else main
            for matrix, main in ((output_VH, main_VH), (projection_GH, main_GH))
        )
        assert grad_output_VH is not None
        for rows_t in target_chunks(targets_T, _longest(output_VH), rows_N):
            hidden_tH, targets_t, share_t = (
                hidden_TH[rows_t],
                targets_T[rows_t],
                share_T[rows_t].to(loss.dtype),
            )
            of_teacher = Teacher(teacher.hidden_TG[rows_t], teacher.output_VG)
            cosine_t, grad_tG = _towards(
                hidden_tH, projection_GH, of_teacher.hidden_TG, -terms.hidden * share_t
            )
            logp_t, kl_t, grad_tV = _compare(hidden_tH, output_VH, of_teacher, targets_t, share_t, terms)
            loss += (
                share_t
                * (terms.kl * terms.temperature**2 * kl_t - terms.ce * logp_t + terms.hidden * (1 - cosine_t))
            ).sum()
            add_product_(grad_output_VH, grad_tV.T, hidden_tH)
            grad_hidden_tH = grad_tV @ output_VH
            if grad_projection_GH is not None:
                add_product_(grad_projection_GH, grad_tG.T, hidden_tH)
            grad_hidden_TH[rows_t] = grad_hidden_tH + (
                grad_tG if projection_GH is None else grad_tG @ projection_GH
            )
            logp_T[rows_t], kl_T[rows_t], cosine_T[rows_t] = logp_t, kl_t, cosine_t
            del grad_tV  # frees the memory for the next chunk
        ctx.added = main_VH is not None
        if ctx.added:
            ctx.save_for_backward(grad_hidden_TH, output_VH, projection_GH)
        else:
            grad_projection_GH = (
                None if grad_projection_GH is None else grad_projection_GH.to(hidden_TH.dtype)
            )
            ctx.save_for_backward(grad_hidden_TH, grad_output_VH.to(output_VH.dtype), grad_projection_GH)
        ctx.mark_non_differentiable(logp_T, kl_T, cosine_T)
        return loss, logp_T, kl_T, cosine_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.added:
            assert_final(grad_loss)
            grad_hidden_TH, *matrices = ctx.saved_tensors
            gradients = [
                grad_hidden_TH,
                *(None if matrix is None else in_main_gradient(matrix) for matrix in matrices),
            ]
        else:
            gradients = [
                None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors
            ]
        return (*gradients, None, None, None, None, None, None, None)


def _longest(output_VH: Tensor) -> int:
    """Positions of a chunk whose logits, in the matrix's type, stay inside CHUNK_BYTES; at least 1."""
    rows = CHUNK_BYTES[output_VH.device.type] // (output_VH.element_size() * len(output_VH))
    if output_VH.is_cuda:
        from vpmoe.objectives import teacher_forced_kernels  # Triton, which only a GPU needs

        rows = teacher_forced_kernels.longest(rows)
    return max(1, rows)


def _towards(
    hidden_tH: Tensor, projection_GH: Tensor | None, teacher_tG: Tensor, factor_t: Tensor
) -> tuple[Tensor, Tensor]:
    """(Cosine of the projected hidden state and the teacher's [t], gradient of factor · cosine with respect
    to the projected [t, G], in the type of hidden)."""
    student_tG = hidden_tH if projection_GH is None else chunk_logits(hidden_tH, projection_GH)
    if hidden_tH.is_cuda:
        from vpmoe.objectives import teacher_forced_kernels  # Triton, which only a GPU needs

        return teacher_forced_kernels.cosine(student_tG, teacher_tG, factor_t, EPSILON)
    student_tG = student_tG.to(torch.promote_types(hidden_tH.dtype, torch.float32))
    cosine_t, grad_tG = _cosine(student_tG, teacher_tG)
    return cosine_t, grad_tG.mul_(factor_t.unsqueeze(1)).to(hidden_tH.dtype)


def _cosine(student_tG: Tensor, teacher_tG: Tensor) -> tuple[Tensor, Tensor]:
    """(cosine [t], its gradient with respect to the student's [t, G]): with unit vectors û and v̂, (v̂ −
    cosine·û) / |u|."""
    teacher_tG = teacher_tG.to(student_tG.dtype)
    teacher_tG = teacher_tG / teacher_tG.norm(dim=1, keepdim=True).clamp(min=EPSILON)
    length_t1 = student_tG.norm(dim=1, keepdim=True).clamp(min=EPSILON)
    student_tG = student_tG / length_t1
    cosine_t1 = (student_tG * teacher_tG).sum(1, keepdim=True)
    return cosine_t1.squeeze(1), (teacher_tG - cosine_t1 * student_tG) / length_t1


def _compare(
    hidden_tH: Tensor,
    output_VH: Tensor,
    teacher: Teacher,
    targets_t: Tensor,
    share_t: Tensor,
    terms: "LossWeights",
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p of the targets [t], KL(teacher‖student) [t], gradient of the loss with respect to the student's
    logits [t, V]). `teacher` has the chunk's hidden states."""
    if hidden_tH.is_cuda:
        from vpmoe.objectives import teacher_forced_kernels  # Triton, which only a GPU needs

        return teacher_forced_kernels.compare(hidden_tH, output_VH, *teacher, targets_t, share_t, terms)
    teacher_tV = teacher.hidden_TG @ teacher.output_VG.T
    logits_tV = chunk_logits(hidden_tH, output_VH)
    rows_t = torch.arange(len(targets_t))
    student_tV, teacher_tV = (
        (logits_tV / terms.temperature).log_softmax(1),
        teacher_tV.div_(terms.temperature).log_softmax(1),
    )
    p_tV = teacher_tV.exp()
    kl_t = teacher_tV.sub_(student_tV).mul_(p_tV).sum(1)
    grad_tV = student_tV.exp_().sub_(p_tV).mul_(terms.kl * terms.temperature)
    logp_tV = logits_tV.log_softmax(1)
    logp_t = logp_tV[rows_t, targets_t]
    grad_tV.add_(logp_tV.exp_(), alpha=terms.ce)
    grad_tV[rows_t, targets_t] -= terms.ce
    return logp_t, kl_t, grad_tV.mul_(share_t.unsqueeze(1))
