"""Squared ReLU on a GPU, one pass over memory in either direction: Triton kernels.

torch takes two kernels forward and four backward. What the routed experts do is in experts_gpu.py. Everything
between inputs and outputs is fp32.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable

NUMBERS = 2048
"""Numbers of a program."""


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)²."""
    out: Tensor = _SquaredRelu.apply(x)  # type: ignore[no-untyped-call]
    return out


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        _forward[(triton.cdiv(x.numel(), NUMBERS),)](x, out, x.numel(), NUMBERS, num_warps=4)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        _backward[(triton.cdiv(x.numel(), NUMBERS),)](
            gradient.contiguous(), x, out, x.numel(), NUMBERS, num_warps=4
        )
        return out


@triton.jit  # type: ignore[untyped-decorator]  # n is a multiple of 16, so a thread loads 16 bytes at a time
def _forward(x, out, n, B: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    value = tl.maximum(tl.load(x + place, mask=place < n, other=0.0).to(tl.float32), 0.0)
    tl.store(out + place, (value * value).to(out.dtype.element_ty), mask=place < n)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(gradient, x, out, n, B: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    value = tl.maximum(tl.load(x + place, mask=place < n, other=0.0).to(tl.float32), 0.0)
    d = 2 * value * tl.load(gradient + place, mask=place < n, other=0.0).to(tl.float32)
    tl.store(out + place, d.to(out.dtype.element_ty), mask=place < n)
