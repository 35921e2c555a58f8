"""The kernels of self_attention_gpu.py beside their definitions in float64.

    TRITON_INTERPRET=1 python -m tests.fakes.projection_cases

runs them without a GPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vpmoe.model import self_attention_gpu
from vpmoe.model.tensor_product import tensor_product

ROUNDED = 5e-3
"""Allowed relative error of a norm: sums are fp32, and only outputs and gradients are rounded to bf16 (2⁻⁹,
which a norm shows as 2e-3)."""


def assert_near(
    kernel: Callable[..., tuple[Tensor, ...]], definition: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
) -> list[Tensor]:
    """Outputs and gradients of both agree. Returns the kernel's."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found, wanted = kernel(*inputs), definition(*exact)
    directions = [torch.randn_like(x) for x in found]
    found += torch.autograd.grad(found, inputs, directions)
    wanted += torch.autograd.grad(wanted, exact, [x.double() for x in directions])
    for x, y in zip(found, wanted, strict=True):
        assert (x.double() - y).norm() <= ROUNDED * y.norm()
    return list(found)


def tensor_products(
    device: torch.device, dtype: torch.dtype, positions: int, width: int, biased: bool
) -> list[Tensor]:
    heads, groups, ranks = 8, 2, (4, 2)
    factors = 4 * (8 + width) + 2 * 2 * (2 + width)
    inputs = [torch.randn(positions, 2, factors, device=device, dtype=dtype).requires_grad_()]
    if biased:
        inputs.append(torch.randn(12 * width, device=device, dtype=dtype).requires_grad_())

    def kernel(factors: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        return self_attention_gpu.tensor_product(factors, bias, heads, groups, width, ranks)

    def definition(factors: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        parts = tensor_product(factors, heads, groups, width, ranks)
        if bias is None:
            return parts
        biases = bias.view(12, width).split([heads, groups, groups])
        return tuple(part + bias for part, bias in zip(parts, biases, strict=True))

    return assert_near(kernel, definition, *inputs)


def mixed_values(device: torch.device, dtype: torch.dtype, positions: int) -> list[Tensor]:
    value, first = (
        torch.randn(positions, 1, 2, 64, device=device, dtype=dtype).requires_grad_() for _ in range(2)
    )
    mix = torch.tensor([0.3], device=device, requires_grad=True)

    def definition(value: Tensor, first: Tensor, mix: Tensor) -> tuple[Tensor, ...]:
        share = 1 / (1 + (-mix).exp())
        return (first + share * (value - first),)

    return assert_near(
        lambda *inputs: (self_attention_gpu.mix_values(*inputs),), definition, value, first, mix
    )


def main() -> None:
    torch.manual_seed(1)
    cpu = torch.device("cpu")
    tensor_products(cpu, torch.float16, 11, 16, biased=True)
    mixed_values(cpu, torch.float16, 40)


if __name__ == "__main__":
    main()
