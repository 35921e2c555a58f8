"""The grouped matrix product of the experts, with the gradients that its definition implies on every GPU, and
the rows of their biases.

This file is copied into every exported model folder, so it imports nothing but torch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, grouped_mm


def grouped_product(rows_nI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """[n, O]: each row times the transposed matrix of its group.

    `ends_E` int32: where each group of the n rows ends. A group may be empty, and so may all: then the
    gradient of its matrix is zero.
    """
    if not len(rows_nI):  # on GPUs the backward of no rows at all fails ("Invalid strides/sizes")
        return rows_nI @ weight_EOI[0].T
    if torch.is_grad_enabled() and weight_EOI.requires_grad and leaves_empty_groups_unset(weight_EOI.device):
        weight_EOI = clear_gradient_of_empty_groups(weight_EOI, ends_E)
    return grouped_mm(rows_nI, weight_EOI.transpose(1, 2), offs=ends_E)


def expert_of_row(ends_E: Tensor, rows: int) -> Tensor:
    """[rows] int64: the group of each row. `ends_E` as in `grouped_product`."""
    return torch.searchsorted(
        ends_E, torch.arange(rows, device=ends_E.device, dtype=ends_E.dtype), right=True
    )


def rows_of(bias: Tensor, expert_n: Tensor, experts: int) -> Tensor:
    """[n, W]: each row's bias, from those of all experts, flat.

    As an embedding, whose backward sums in a fixed order on GPUs, where an index's backward does not.
    """
    return embedding(expert_n, bias.view(experts, -1))


def leaves_empty_groups_unset(device: torch.device) -> bool:
    """Whether the gradient of an empty group's matrix is uninitialised memory there, as on GPUs from
    Blackwell on (compute capability 10; https://github.com/pytorch/pytorch/issues/172439)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


def clear_gradient_of_empty_groups(weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`weight_EOI`; in the backward, the gradient of a matrix whose group has no rows becomes zero.

    It costs a pass over the gradient, so it is not done where it is not needed.
    """
    same: Tensor = _ClearEmpty.apply(weight_EOI, ends_E)  # type: ignore[no-untyped-call]
    return same


class _ClearEmpty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E)
        return weight_EOI.view_as(weight_EOI)

    @staticmethod
    def backward(ctx: Any, gradient_EOI: Tensor) -> tuple[Tensor, None]:
        (ends_E,) = ctx.saved_tensors
        empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        return gradient_EOI.masked_fill(empty_E[:, None, None], 0), None  # not a product: garbage may be NaN
