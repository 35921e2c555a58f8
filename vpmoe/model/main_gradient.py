"""A weight's gradient, added to megatron's fp32 buffer by the product that computes it.

Otherwise the product rounds its sum to bf16 and writes it, and megatron's hook reads it back and adds it to
the buffer in another pass. Here the sum stays in fp32, and the hook only learns that the gradient is there.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def add_to_main_gradient(weight: Tensor, add: Callable[[Tensor], None]) -> Tensor | None:
    """Call `add` with the fp32 buffer of a parameter, in its shape, to which it adds the gradient.

    Call it in a backward, once for a parameter. Returns what the backward returns as the parameter's
    gradient: uninitialised memory, for megatron's hook. None if the parameter has no buffer, as in a student
    without DDP: `add` was not called, and the backward computes the gradient in the parameter's dtype.
    """
    if not hasattr(weight, "main_grad"):
        return None
    allocate: Callable[[Tensor], None] | None = getattr(weight, "allocate_main_grad", None)
    if allocate is not None:  # sharded_gradients.py: a bucket has memory from its first gradient on
        allocate(weight)
    add(weight.main_grad)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # read by megatron's hook
    return torch.empty_like(weight)
