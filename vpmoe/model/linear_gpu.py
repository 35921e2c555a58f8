"""Linear maps on a GPU: the bias in the product's own epilogue, gradients straight into the fp32 buffers.

megatron adds a bias after the product, in a pass over memory of its own, and adds a weight's gradient to the
buffer in another. torch's sums over positions read at a third of the memory's speed (sums_gpu.py).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpmoe.model.main_gradient import gradient_of_weight
from vpmoe.model.sums_gpu import column_sums, gradient_of_vector


def linear(x: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
    """x […, I] · weightᵀ + bias: […, O]. The bias is added before the sum is rounded."""
    out: Tensor = _Linear.apply(x, weight_OI, bias)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI, bias)
        x_NI = x.reshape(-1, x.shape[-1])
        out = x_NI @ weight_OI.T if bias is None else torch.addmm(bias, x_NI, weight_OI.T)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight_OI, bias = ctx.saved_tensors
        gradient_NO = gradient.reshape(-1, gradient.shape[-1])
        return (
            (gradient_NO @ weight_OI).view(x.shape),
            gradient_of_weight(weight_OI, gradient_NO, x.reshape(-1, x.shape[-1])),
            None if bias is None else gradient_of_vector(bias, column_sums(gradient_NO)),
        )
