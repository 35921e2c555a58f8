"""A parameter's gradient, added to megatron's fp32 buffer by the product or kernel that computes it.

Otherwise that rounds its sum to bf16 and writes it, and megatron's hook reads it back and adds it to
the buffer in another pass. Here the sum stays in fp32, and the hook only learns that the gradient is there.

Parameters with an `empty_main_grad`, an int32 scalar on the GPU, do without zeros in their buffer: while it
is 1, what is there is of another step, and a kernel stores the gradient instead of adding it (experts_gpu.py,
whose parameters are most of a student's). Learner sets it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def add_to_main_gradient(weight: Tensor, add: Callable[[Tensor], None]) -> Tensor | None:
    """Call `add` with the fp32 buffer of a parameter, in its shape, to which it adds the gradient.

    Call it in a backward, once for a parameter. Returns what the backward returns as the parameter's
    gradient: uninitialised memory, for megatron's hook. None if the parameter has no buffer, as in a student
    without DDP: `add` was not called, and the backward computes the gradient in the parameter's dtype.
    """
    main = main_gradient(weight)
    if main is None:
        return None
    add(main)
    return in_main_gradient(weight)


def main_gradient(weight: Tensor) -> Tensor | None:
    """The fp32 buffer of a parameter's gradient, in its shape; None without one."""
    if not hasattr(weight, "main_grad"):
        return None
    allocate: Callable[[Tensor], None] | None = getattr(weight, "allocate_main_grad", None)
    if allocate is not None:  # sharded_gradients.py: a bucket has memory from its first gradient on
        allocate(weight)
    main: Tensor = weight.main_grad
    return main


def in_main_gradient(weight: Tensor) -> Tensor:
    """What a backward returns as a parameter's gradient that is in its buffer already."""
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # read by megatron's hook
    return torch.empty_like(weight)


def gradient_so_far(x: Tensor) -> Tensor | None:
    """The sum of the gradients of a tensor that several layers read, by those whose backward ran before: a
    kernel adds to it in place, with the bits of a sum of two tensors, and its backward returns it. None if
    there is none, and the backward returns this layer's gradient alone. layer_graphs.py sets it."""
    return getattr(x, "gradient_so_far", None)


def set_gradient_so_far(x: Tensor, total: Tensor | None) -> None:
    reader: Any = x
    reader.gradient_so_far = total


def gradient_of_weight(weight_OI: Tensor, gradient_NO: Tensor, x_NI: Tensor) -> Tensor:
    """What a backward of y = x · weightᵀ returns as the gradient of the weight: gradientᵀ · x. Added to the
    weight's buffer if it has one, as in add_to_main_gradient."""
    added = add_to_main_gradient(weight_OI, lambda main_OI: add_product_(main_OI, gradient_NO.T, x_NI))
    return gradient_NO.T @ x_NI if added is None else added


def add_product_(sum_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    """sum += left @ right, with the sum in fp32 even if the factors are bf16."""
    if left_MK.dtype == sum_MN.dtype:
        sum_MN.addmm_(left_MK, right_KN)
    else:
        torch.addmm(sum_MN, left_MK, right_KN, out_dtype=torch.float32, out=sum_MN)
