"""The grouped matrix product of the experts, with the gradients that its definition implies on every GPU, and
their biases.

This file is copied into every exported model folder, so it imports nothing but torch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, pad

COLUMN = 8
"""Columns that stand for one: a row of a GPU's grouped product has a multiple of 16 bytes."""


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


def grouped_product_with_bias(
    rows_nI: Tensor, weight_EOI: Tensor, bias: Tensor, share_n: Tensor, ends_E: Tensor
) -> Tensor:
    """[n, O]: grouped_product, plus each row's share of its group's bias. `bias` is flat, [groups · O].

    The biases are one more column of the matrices and the shares one more of the rows. The trainer's kernels
    on a GPU add a bias themselves (experts_gpu.py).
    """
    share_nC = pad(share_n.unsqueeze(1).to(rows_nI.dtype), (0, COLUMN - 1))
    bias_EOC = pad(bias.view(*weight_EOI.shape[:2], 1), (0, COLUMN - 1))
    return grouped_product(torch.cat([rows_nI, share_nC], 1), torch.cat([weight_EOI, bias_EOC], 2), ends_E)


def rows_of(bias: Tensor, ends_E: Tensor, rows: int) -> Tensor:
    """[rows, W]: the bias of each row's group. `bias` is flat, [groups · W]; `ends_E` as in
    `grouped_product`. The gradient is a grouped product with ones.
    """
    chosen: Tensor = _RowsOf.apply(bias, ends_E, rows)  # type: ignore[no-untyped-call]
    return chosen


class _RowsOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, ends_E: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(ends_E)
        row_n = torch.arange(rows, device=ends_E.device, dtype=ends_E.dtype)
        return bias.view(len(ends_E), -1).index_select(0, torch.searchsorted(ends_E, row_n, right=True))

    @staticmethod
    def backward(ctx: Any, gradient_nW: Tensor) -> tuple[Tensor, None, None]:
        (ends_E,) = ctx.saved_tensors
        rows, width = gradient_nW.shape
        if not rows:
            return gradient_nW.new_zeros(len(ends_E) * width), None, None
        ones_Cn = gradient_nW.new_ones(rows, COLUMN).T
        sums_EW = grouped_mm(ones_Cn, gradient_nW.contiguous(), offs=ends_E)[:, 0]
        return sums_EW.flatten(), None, None


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


def _empty(ends_E: Tensor) -> Tensor:
    """[E] bool: which groups have no rows."""
    return ends_E.diff(prepend=ends_E.new_zeros(1)) == 0


class _ClearEmpty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E)
        return weight_EOI.view_as(weight_EOI)

    @staticmethod
    def backward(ctx: Any, gradient_EOI: Tensor) -> tuple[Tensor, None]:
        (ends_E,) = ctx.saved_tensors
        # not a product: garbage may be NaN
        return gradient_EOI.masked_fill(_empty(ends_E)[:, None, None], 0), None
