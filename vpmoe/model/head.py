"""The loss head: log p(target), loss and gradients from hidden states, without a [tokens, vocabulary] tensor.

The gradient of Σ c·(−log p) with respect to the logits is c·(softmax − onehot), known as soon as a chunk's
log-sum-exp is known. So the forward computes it chunk by chunk over tokens, and the backward only scales it:
nothing is computed twice, and three matrix products remain. This also holds for coefficients that depend on
log p, if log p is detached.

Not supported: label smoothing, z-loss, tensor parallelism over the vocabulary, second derivatives. The head
of TeacherForced is in vpmoe/objectives/teacher_forced_head.py.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpmoe.model.main_gradient import add_product_, in_main_gradient, main_gradient
from vpmoe.model.spans import target_rows

Coefficient = Callable[[Tensor, Tensor], Tensor]
"""`(logp_t [t] detached, rows_t [t] int64) -> c_t [t]`: the coefficients of a chunk's targets; rows_t are
positions in the batch."""

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}
"""Bound on one chunk's logits in fp32: at a vocabulary of 201,088 that is 166 and 2,669 tokens."""


def head_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    coefficient: Coefficient,
    rows_N: Tensor | None = None,
    *,
    final: bool = False,
) -> tuple[Tensor, Tensor]:
    """(Σ c·(−log p), log p [T] detached). Positions with target NO_TARGET are skipped; their log p is NaN.

    Differentiable in hidden and weight. On the GPU hidden and weight are bf16; logits, sums and the weight's
    gradient are fp32. Elsewhere everything has the dtype of hidden (fp32, or fp64 in tests). Autograd gets
    both gradients in their parameter's dtype. `rows_N` [N] int64 are the positions that have a target, in
    order (Batch.target_rows); without it they are found, for which the host waits for the GPU.

    `final`: the caller differentiates this loss itself, once, without a factor. Then, on a GPU, the weight's
    gradient is added to its fp32 buffer, if it has one, before this function returns.
    """
    main_VH = gradients_in_forward(weight_VH) if final else None
    loss, logp_T = _Head.apply(  # type: ignore[no-untyped-call]
        hidden_TH, weight_VH, targets_T, coefficient, rows_N, main_VH
    )
    return loss, logp_T


def gradients_in_forward(weight: Tensor) -> Tensor | None:
    """The fp32 buffer to which a head adds the gradient of a weight as soon as it is known; None if it has to
    wait for the backward. On the CPU it waits, which keeps the bits of a run as they are."""
    return main_gradient(weight) if weight.is_cuda and torch.is_grad_enabled() else None


@torch.no_grad()
def target_logp(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, rows_N: Tensor | None = None
) -> Tensor:
    """log p(target) [T] without gradients; NaN without a target. In fp32, or fp64 if hidden is. `rows_N`: see
    head_loss."""
    logp_T = unscored_logp(hidden_TH)
    for rows_t in target_chunks(targets_T, _longest(weight_VH), rows_N):
        logp_T[rows_t] = _logp(hidden_TH[rows_t], weight_VH, targets_T[rows_t])
    return logp_T


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        coefficient: Coefficient,
        rows_N: Tensor | None,
        main_VH: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        logp_T = unscored_logp(hidden_TH)
        loss = logp_T.new_zeros(())
        grad_hidden_TH = torch.zeros_like(hidden_TH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=logp_T.dtype) if main_VH is None else main_VH
        for rows_t in target_chunks(targets_T, _longest(weight_VH), rows_N):
            hidden_tH, targets_t = hidden_TH[rows_t], targets_T[rows_t]
            logits_tV = chunk_logits(hidden_tH, weight_VH)
            lse_t, logp_t = _log_sum_exp(logits_tV, targets_t)
            c_t = coefficient(logp_t, rows_t).to(logp_t.dtype)
            loss -= (c_t * logp_t).sum()
            grad_tV = _gradient_(logits_tV, targets_t, lse_t, c_t, hidden_TH.dtype)
            grad_hidden_TH[rows_t] = grad_tV @ weight_VH
            add_product_(grad_weight_VH, grad_tV.T, hidden_tH)
            logp_T[rows_t] = logp_t
            del logits_tV, grad_tV  # or they would exist beside the next chunk's
        ctx.added = main_VH is not None
        ctx.save_for_backward(grad_hidden_TH, weight_VH if ctx.added else grad_weight_VH.to(weight_VH.dtype))
        ctx.mark_non_differentiable(logp_T)
        return loss, logp_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_TH, weight_or_gradient_VH = ctx.saved_tensors
        if ctx.added:
            assert_final(grad_loss)
            return grad_hidden_TH, in_main_gradient(weight_or_gradient_VH), None, None, None, None
        return (
            grad_hidden_TH * grad_loss.to(grad_hidden_TH.dtype),
            weight_or_gradient_VH * grad_loss.to(weight_or_gradient_VH.dtype),
            None,
            None,
            None,
            None,
        )


def assert_final(grad_loss: Tensor) -> None:
    """End the process, without waiting for the GPU, if a loss that was said to be final has a factor: its
    gradients are in the buffers without it."""
    torch._assert_async(grad_loss == 1, "a final loss must be differentiated as it is")


def unscored_logp(hidden_TH: Tensor) -> Tensor:
    """[T] of NaN, in fp32, or fp64 if hidden is."""
    return torch.full(
        (len(hidden_TH),),
        torch.nan,
        dtype=torch.promote_types(hidden_TH.dtype, torch.float32),
        device=hidden_TH.device,
    )


def _longest(weight_VH: Tensor) -> int:
    """The largest number of positions whose logits fit in CHUNK_BYTES; at least 1."""
    return max(1, CHUNK_BYTES[weight_VH.device.type] // (4 * len(weight_VH)))


def target_chunks(targets_T: Tensor, longest: int, rows_N: Tensor | None = None) -> Iterator[Tensor]:
    """Indices of the positions that have a target, in pieces of about equal length, at most `longest`.
    `rows_N`: see head_loss."""
    if rows_N is None:
        rows_N = target_rows(targets_T)
    pieces = -(-len(rows_N) // longest)
    yield from rows_N.tensor_split(pieces) if pieces else ()


def chunk_logits(hidden_tH: Tensor, weight_VH: Tensor) -> Tensor:
    """[t, V], in fp32 if hidden is bf16 or fp16."""
    if hidden_tH.dtype in (torch.bfloat16, torch.float16):  # keep the product's fp32 accumulator
        return torch.mm(hidden_tH, weight_VH.T, out_dtype=torch.float32)
    return hidden_tH @ weight_VH.T


def _logp(hidden_tH: Tensor, weight_VH: Tensor, targets_t: Tensor) -> Tensor:
    """log p of the targets [t]. On the GPU the logits are not stored, unless hidden is fp32, for which the
    kernel's tiles are too large."""
    if hidden_tH.is_cuda and hidden_tH.dtype != torch.float32:
        from vpmoe.model import kernels  # Triton, which only a GPU needs

        return kernels.logp(hidden_tH, weight_VH, targets_t)
    return _log_sum_exp(chunk_logits(hidden_tH, weight_VH), targets_t)[1]


def _log_sum_exp(logits_tV: Tensor, targets_t: Tensor) -> tuple[Tensor, Tensor]:
    """(log Σ exp(logits) [t], log p of the targets [t])."""
    if logits_tV.is_cuda:
        from vpmoe.model import kernels  # Triton, which only a GPU needs

        return kernels.log_sum_exp(logits_tV, targets_t)
    lse_t = logits_tV.logsumexp(1)
    return lse_t, logits_tV.gather(1, targets_t.unsqueeze(1)).squeeze(1) - lse_t


def _gradient_(
    logits_tV: Tensor, targets_t: Tensor, lse_t: Tensor, c_t: Tensor, dtype: torch.dtype
) -> Tensor:
    """c·(softmax − onehot) [t, V] in `dtype`. On the CPU it overwrites the logits."""
    if logits_tV.is_cuda:
        from vpmoe.model import kernels

        return kernels.gradient(logits_tV, targets_t, lse_t, c_t, dtype)
    grad_tV = logits_tV.sub_(lse_t.unsqueeze(1)).exp_().mul_(c_t.unsqueeze(1))
    grad_tV[torch.arange(len(targets_t), device=targets_t.device), targets_t] -= c_t
    return grad_tV
