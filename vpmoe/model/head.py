"""The loss head: log p(target), loss and gradients from hidden states, without a [tokens, vocabulary] tensor.

The gradient of Σ c·(−log p) with respect to the logits is c·(softmax − onehot), known as soon as a chunk's
log-sum-exp is known. So the forward computes it chunk by chunk over tokens, and the backward only scales it:
nothing is computed twice, and three matrix products remain. This also holds for coefficients that depend on
log p, if log p is detached.

On a GPU the logits' product itself computes exp(logits − reference), with any reference of a row, and its
sum Z. The gradient is c/Z·G with G = exp(logits − reference) − Z·onehot. Of the products with G, c/Z scales
the hidden states of one and the result of the other, so that no pass over [chunk, vocabulary] is left.

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

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 960 << 20}
"""Bound on one chunk's logits, in fp32 on a CPU and in bf16 on a GPU: at a vocabulary of 201,088 that is 166
and 2,502 tokens."""


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
    gradient are fp32; each factor of the gradients' products is rounded to bf16 once. Elsewhere, and of fp32
    on a GPU, everything has the dtype of hidden (fp32, or fp64 in tests). Autograd gets both gradients in
    their parameter's dtype. `rows_N` [N] int64 are the positions that have a target, in order
    (Batch.target_rows); without it they are found, for which the host waits for the GPU.

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
    for rows_t in target_chunks(targets_T, _longest(hidden_TH, weight_VH), rows_N):
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
        add_gradients = _add_gradients_in_kernels if _has_kernels(hidden_TH) else _add_gradients
        grad_hidden_TH = torch.zeros_like(hidden_TH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=logp_T.dtype) if main_VH is None else main_VH
        for rows_t in target_chunks(targets_T, _longest(hidden_TH, weight_VH), rows_N):
            logp_t, c_t, grad_hidden_TH[rows_t] = add_gradients(
                hidden_TH[rows_t], weight_VH, targets_T[rows_t], rows_t, coefficient, grad_weight_VH
            )
            loss -= (c_t * logp_t).sum()
            logp_T[rows_t] = logp_t
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


def _has_kernels(hidden_TH: Tensor) -> bool:
    return hidden_TH.is_cuda and hidden_TH.dtype == torch.bfloat16


def _longest(hidden_TH: Tensor, weight_VH: Tensor) -> int:
    """The largest number of positions whose logits fit in CHUNK_BYTES; at least 1."""
    size = 2 if _has_kernels(hidden_TH) else 4
    return max(1, CHUNK_BYTES[weight_VH.device.type] // (size * len(weight_VH)))


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
    """log p of the targets [t]. The kernels do not store the logits."""
    if _has_kernels(hidden_tH):
        from vpmoe.model import kernels  # Triton, which only a GPU needs

        return kernels.logp(hidden_tH, weight_VH, targets_t)
    return _log_sum_exp(chunk_logits(hidden_tH, weight_VH), targets_t)[1]


def _add_gradients(
    hidden_tH: Tensor,
    weight_VH: Tensor,
    targets_t: Tensor,
    rows_t: Tensor,
    coefficient: Coefficient,
    grad_weight_VH: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p [t], coefficients [t], gradient of hidden [t, H]) of a chunk. Adds the gradient of weight."""
    logits_tV = chunk_logits(hidden_tH, weight_VH)
    lse_t, logp_t = _log_sum_exp(logits_tV, targets_t)
    c_t = coefficient(logp_t, rows_t).to(logp_t.dtype)
    grad_tV = logits_tV.sub_(lse_t.unsqueeze(1)).exp_().mul_(c_t.unsqueeze(1))
    grad_tV[torch.arange(len(targets_t), device=targets_t.device), targets_t] -= c_t
    grad_tV = grad_tV.to(hidden_tH.dtype)
    add_product_(grad_weight_VH, grad_tV.T, hidden_tH)
    return logp_t, c_t, grad_tV @ weight_VH


def _add_gradients_in_kernels(
    hidden_tH: Tensor,
    weight_VH: Tensor,
    targets_t: Tensor,
    rows_t: Tensor,
    coefficient: Coefficient,
    grad_weight_VH: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """_add_gradients with G and Z."""
    from vpmoe.model import kernels  # Triton, which only a GPU needs

    g_tV, z_t, logp_t = kernels.gradient(hidden_tH, weight_VH, targets_t)
    c_t = coefficient(logp_t, rows_t).to(logp_t.dtype)
    scale_t1 = (c_t / z_t).unsqueeze(1)
    scaled_tH, grad_hidden_tH = (torch.empty_like(hidden_tH) for _ in range(2))
    torch.mul(hidden_tH, scale_t1, out=scaled_tH)  # in fp32, rounded once
    add_product_(grad_weight_VH, g_tV.T, scaled_tH)
    torch.mul(torch.mm(g_tV, weight_VH, out_dtype=torch.float32), scale_t1, out=grad_hidden_tH)
    return logp_t, c_t, grad_hidden_tH


def _log_sum_exp(logits_tV: Tensor, targets_t: Tensor) -> tuple[Tensor, Tensor]:
    """(log Σ exp(logits) [t], log p of the targets [t])."""
    lse_t = logits_tV.logsumexp(1)
    return lse_t, logits_tV.gather(1, targets_t.unsqueeze(1)).squeeze(1) - lse_t
