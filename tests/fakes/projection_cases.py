"""The kernels of tensor_product_gpu.py, self_attention_gpu.py, qk_norm_gpu.py, norm_gpu.py,
activation_gpu.py, linear_gpu.py and embedding_gpu.py beside their definitions in float64.

    TRITON_INTERPRET=1 python -m tests.fakes.projection_cases

runs them without a GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vpmoe.model import (
    activation_gpu,
    embedding_gpu,
    linear_gpu,
    norm_gpu,
    qk_norm_gpu,
    self_attention_gpu,
    sums_gpu,
    tensor_product_gpu,
)
from vpmoe.model.main_gradient import set_gradient_so_far
from vpmoe.model.self_attention import rotate
from vpmoe.model.tensor_product import tensor_product

Function = Callable[..., tuple[Tensor, ...]]

ROUNDED = 5e-3
"""Allowed relative error of a norm: sums are fp32, and only outputs and gradients are rounded to bf16 (2⁻⁹,
which a norm shows as 2e-3)."""

SUMMED = 1e-5
"""Allowed relative error of the norm of a sum in fp32 of products that are exact in fp32."""


def assert_near(kernel: Function, definition: Function, *inputs: Tensor) -> list[Tensor]:
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
    device: torch.device, dtype: torch.dtype, positions: int, width: int, *, biased: bool, mixes: bool
) -> list[Tensor]:
    """Queries, keys and values of a local layer; angles as in a document of 32,768."""
    heads = tensor_product_gpu.Heads(8, 2, 4, 2, width)
    factors = 4 * (8 + width) + 2 * 2 * (2 + width)
    inputs = {"factors": torch.randn(positions, 2, factors, device=device, dtype=dtype)}
    for name in ("query_weight", "key_weight"):
        inputs[name] = (1 + 0.3 * torch.randn(width, device=device)).to(dtype)
    inputs["angle"] = some_angles(device, positions, width)
    if biased:
        inputs["bias"] = torch.randn(12 * width, device=device, dtype=dtype)
    if mixes:
        inputs["first"] = torch.randn(positions, 2, 2, width, device=device, dtype=dtype)
        inputs["mix"] = torch.tensor([0.3], device=device)

    def kernel(*leaves: Tensor) -> tuple[Tensor, ...]:
        x = dict(zip(inputs, leaves, strict=True))
        weights = x["query_weight"], x["key_weight"]
        return tensor_product_gpu.projections(
            x["factors"], x.get("bias"), *weights, 1e-6, x["angle"], heads, x.get("first"), x.get("mix")
        )

    def definition(*leaves: Tensor) -> tuple[Tensor, ...]:
        x = dict(zip(inputs, leaves, strict=True))
        parts = tensor_product(x["factors"], 8, 2, width, (4, 2))
        if biased:
            biases = x["bias"].view(12, width).split([8, 2, 2])
            parts = tuple(part + bias for part, bias in zip(parts, biases, strict=True))  # type: ignore[assignment]
        query, key = (
            exactly_normed(part, weight, x["angle"])
            for part, weight in zip(parts, (x["query_weight"], x["key_weight"]), strict=False)
        )
        if not mixes:
            return query, key, parts[2]
        share = x["mix"].sigmoid()
        return query, key, share * parts[2] + (1 - share) * x["first"]

    return assert_near(kernel, definition, *(x.requires_grad_() for x in inputs.values()))


def some_angles(device: torch.device, positions: int, width: int) -> Tensor:
    """Of up to 3e4, as in a long document. fp32 rounds such an angle by 1e-3, so both get the same."""
    frequency = 10_000 ** -(torch.arange(0, width, 2, device=device) / width)
    half = torch.randint(0, 32_768, (positions, 2, 1, 1), device=device) * frequency
    return torch.cat([half, half], 3)


def exactly_normed(x: Tensor, weight: Tensor, angle: Tensor | None) -> Tensor:
    """Heads after their norm and rotation. As in the kernels, an angle's gradient is in the first half."""
    y = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    if angle is None:
        return y
    angle = torch.cat([angle[..., : x.shape[-1] // 2]] * 2, -1)
    return rotate(y, angle.cos(), angle.sin())


def mixed_values(
    device: torch.device, dtype: torch.dtype, positions: int, *, apart: bool = True
) -> list[Tensor]:
    """Not `apart`: values that stand beside other numbers, as in a layer's projections."""
    value, first = (
        torch.randn(positions, 1, 2, 64, device=device, dtype=dtype).requires_grad_() for _ in range(2)
    )
    if not apart:
        value = torch.randn(positions, 1, 2, 192, device=device, dtype=dtype)[..., 128:].requires_grad_()
    mix = torch.tensor([0.3], device=device, requires_grad=True)

    def definition(value: Tensor, first: Tensor, mix: Tensor) -> tuple[Tensor, ...]:
        share = 1 / (1 + (-mix).exp())
        return (first + share * (value - first),)

    return assert_near(
        lambda *inputs: (self_attention_gpu.mix_values(*inputs),), definition, value, first, mix
    )


def gradient_of_mix_in_its_buffer(device: torch.device, dtype: torch.dtype) -> None:
    """It is added to what is there."""
    value, first = (torch.randn(3000, 1, 2, 64, device=device, dtype=dtype) for _ in range(2))
    mix: Any = torch.tensor([0.3], device=device, requires_grad=True)
    direction = torch.randn_like(value)
    self_attention_gpu.mix_values(value, first, mix).backward(direction)
    wanted, mix.grad = mix.grad, None
    mix.main_grad, mix.grad_added_to_main_grad = torch.ones_like(mix), False
    self_attention_gpu.mix_values(value, first, mix).backward(direction)
    assert mix.grad_added_to_main_grad
    torch.testing.assert_close(mix.main_grad, 1 + wanted, rtol=1e-6, atol=0)  # a GPU rounds a·b + c once


def gradients_are_added_to_those_so_far(device: torch.device, dtype: torch.dtype, positions: int) -> None:
    """Of angles and first values, in place, with the bits of a sum of two tensors."""
    width = 16
    heads = tensor_product_gpu.Heads(8, 2, 4, 2, width)
    factors = torch.randn(positions, 1, 4 * (8 + width) + 2 * 2 * (2 + width), device=device, dtype=dtype)
    weights = [torch.ones(width, device=device, dtype=dtype) for _ in range(2)]
    angle = some_angles(device, positions, width)[:, :1].clone().requires_grad_()
    first = torch.randn(positions, 1, 2, width, device=device, dtype=dtype).requires_grad_()
    mix = torch.tensor([0.3], device=device)

    def local() -> Tensor:
        parts = tensor_product_gpu.projections(
            factors, None, weights[0], weights[1], 1e-6, angle, heads, first, mix
        )
        return torch.cat([part.flatten() for part in parts])

    def others() -> Tensor:
        return self_attention_gpu.mix_values(first.detach().flip(0), first, mix).flatten()

    for layer, leaves in ((local, [angle, first]), (others, [first])):
        out = layer()
        direction = torch.randn_like(out)
        own = torch.autograd.grad(out, leaves, direction)
        before = [torch.randn_like(x) for x in leaves]
        if layer is local:
            before[0][..., width // 2 :] = 0
        wanted = [x + y for x, y in zip(before, own, strict=True)]
        for leaf, total in zip(leaves, before, strict=True):
            set_gradient_so_far(leaf, total)
        found = torch.autograd.grad(layer(), leaves, direction)
        for leaf, one, total, other in zip(leaves, found, before, wanted, strict=True):
            set_gradient_so_far(leaf, None)
            assert one.data_ptr() == total.data_ptr() and torch.equal(one, other)


def normed_projections(
    device: torch.device, dtype: torch.dtype, positions: int, width: int, *, rotates: bool
) -> list[Tensor]:
    """Of two groups with four query heads each; the values come out as they are."""
    mixed = torch.randn(positions, 2, 2, 6 * width, device=device, dtype=dtype).requires_grad_()
    weights = [(1 + 0.3 * torch.randn(width, device=device)).to(dtype).requires_grad_() for _ in range(2)]
    angle = [some_angles(device, positions, width).requires_grad_()] if rotates else []

    def kernel(mixed: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return qk_norm_gpu.norm_and_rotate_projections(
            mixed, others[0], others[1], 1e-6, others[2] if rotates else None, 8
        )

    def definition(mixed: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        query, key, value = mixed.split([4 * width, width, width], 3)
        angle = others[2] if rotates else None
        query = exactly_normed(query.reshape(positions, 2, 8, width), others[0], angle)
        return query, exactly_normed(key, others[1], angle), value

    return assert_near(kernel, definition, mixed, *weights, *angle)


def normed(
    device: torch.device, dtype: torch.dtype, rows: int, width: int, addends: int = 1, readers: int = 1
) -> list[Tensor]:
    """A sum of the stream, which is rounded, so that its norm is of another one than in float64."""
    parts = [torch.randn(rows, 2, width, device=device, dtype=dtype).requires_grad_() for _ in range(addends)]
    weight = (1 + 0.3 * torch.randn(width, device=device)).to(dtype).requires_grad_()

    def definition(weight: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        x = torch.stack(parts).sum(0)
        return x, *[x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight] * readers

    return assert_near(
        lambda weight, *parts: norm_gpu.sum_and_norm(parts, weight, 1e-6, readers),
        definition,
        weight,
        *parts,
    )


def norm_of_which_only_some_is_read(device: torch.device, dtype: torch.dtype) -> None:
    """Autograd then gives None for the gradients of the others, of the stream too."""
    leaves = [torch.randn(5, 24, device=device, dtype=dtype).requires_grad_() for _ in range(2)]
    weight = torch.ones(24, device=device, dtype=dtype)
    stream, _, second, third = norm_gpu.sum_and_norm(tuple(leaves), weight, 1e-6, 3)
    direction = torch.randn_like(stream)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    total = exact[0] + exact[1]
    norm = total / (total.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    for outputs, wanted in (([second], [norm]), ([stream], [total]), ([stream, third], [total, norm])):
        ways = [direction] * len(outputs)
        found = torch.autograd.grad(outputs, leaves, ways, retain_graph=True)
        exactly = torch.autograd.grad(wanted, exact, [x.double() for x in ways], retain_graph=True)
        for x, y in zip(found, exactly, strict=True):
            assert (x.double() - y).norm() <= ROUNDED * y.norm()


def totals(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> list[Tensor]:
    parts = [torch.randn(rows, width, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
    return assert_near(
        lambda *parts: (norm_gpu.total_of(*parts),), lambda *parts: (torch.stack(parts).sum(0),), *parts
    )


def squared_relus(
    device: torch.device, dtype: torch.dtype, rows: int, width: int, *, biased: bool
) -> list[Tensor]:
    x = torch.randn(rows, 2, width, device=device, dtype=dtype).requires_grad_()
    bias = [torch.randn(width, device=device, dtype=dtype).requires_grad_()] if biased else []
    return assert_near(
        lambda x, *bias: (activation_gpu.squared_relu(x, bias[0] if biased else None),),
        lambda x, *bias: (sum(bias, x).relu().square(),),
        x,
        *bias,
    )


def linear_maps(
    device: torch.device, dtype: torch.dtype, positions: int, inputs: int, outputs: int
) -> list[Tensor]:
    x = torch.randn(positions, 2, inputs, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype).requires_grad_()
    bias = torch.randn(outputs, device=device, dtype=dtype).requires_grad_()
    return [
        *assert_near(
            lambda *leaves: (linear_gpu.linear(*leaves),),
            lambda x, weight, bias: (x @ weight.T + bias,),
            x,
            weight,
            bias,
        ),
        *assert_near(
            lambda x, weight: (linear_gpu.linear(x, weight, None),),
            lambda x, weight: (x @ weight.T,),
            x,
            weight,
        ),
    ]


def some_tokens(device: torch.device, positions: int, vocabulary: int) -> Tensor:
    """Half of them are the same one."""
    tokens = torch.randint(0, vocabulary, (positions, 2), device=device)
    return tokens.where(torch.rand(positions, 2, device=device) < 0.5, vocabulary // 2)


def embedded(
    device: torch.device, dtype: torch.dtype, positions: int, vocabulary: int, width: int
) -> list[Tensor]:
    tokens = some_tokens(device, positions, vocabulary)
    weight = torch.randn(vocabulary, width, device=device, dtype=dtype).requires_grad_()
    return assert_near(
        lambda weight: (embedding_gpu.embedding(tokens, weight),), lambda weight: (weight[tokens],), weight
    )


def in_buffers(device: torch.device, dtype: torch.dtype, positions: int, width: int) -> list[Tensor]:
    """Two backwards add the gradients of parameters to fp32 buffers, without rounding them before. Returns
    the buffers."""
    tokens = some_tokens(device, positions, 50)
    x = torch.randn(positions, 2, 2 * width, device=device, dtype=dtype)
    factors = torch.randn(positions, 4 * (8 + 16) + 2 * 2 * (2 + 16), device=device, dtype=dtype)
    angle = some_angles(device, positions, 16)[:, 0]
    weights = [torch.ones(16, device=device, dtype=dtype) for _ in range(2)]

    def products(bias: Tensor) -> tuple[Tensor, ...]:
        heads = tensor_product_gpu.Heads(8, 2, 4, 2, 16)
        return tensor_product_gpu.projections(
            factors, bias, weights[0], weights[1], 1e-6, angle, heads, None, None
        )

    def exact_products(bias: Tensor) -> tuple[Tensor, ...]:
        parts = tensor_product(factors.double(), 8, 2, 16, (4, 2))
        biases = bias.view(12, 16).split([8, 2, 2])
        query, key, value = (part + bias for part, bias in zip(parts, biases, strict=True))
        normed = (exactly_normed(x, weights[0].double(), angle.double()) for x in (query, key))
        return *normed, value

    mixed = torch.randn(positions, 1, 2, 6 * 16, device=device, dtype=dtype)

    def normed_heads(*weights: Tensor) -> tuple[Tensor, ...]:
        return qk_norm_gpu.norm_and_rotate_projections(mixed, weights[0], weights[1], 1e-6, None, 8)[:2]

    def exact_normed_heads(*weights: Tensor) -> tuple[Tensor, ...]:
        query, key = mixed.double()[..., :80].split([64, 16], 3)
        parts = (query.reshape(positions, 1, 8, 16), weights[0]), (key, weights[1])
        return tuple(exactly_normed(x, weight, None) for x, weight in parts)

    cases: list[tuple[list[tuple[int, ...]], Function, Function]] = [
        (
            [(width, 2 * width), (width,)],
            lambda weight, bias: (linear_gpu.linear(x, weight, bias),),
            lambda weight, bias: (x.double() @ weight.T + bias,),
        ),
        (
            [(width, 2 * width)],
            lambda weight: (linear_gpu.linear(x, weight, None),),
            lambda weight: (x.double() @ weight.T,),
        ),
        ([(192,)], products, exact_products),
        ([(16,), (16,)], normed_heads, exact_normed_heads),
        (
            [(50, width)],
            lambda weight: (embedding_gpu.embedding(tokens, weight),),
            lambda weight: (weight[tokens],),
        ),
    ]
    buffers = []
    for shapes, kernel, definition in cases:
        leaves = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]
        for leaf in leaves:
            leaf.main_grad = torch.randn(leaf.shape, device=device)  # type: ignore[attr-defined]
        wanted = [leaf.main_grad.double() for leaf in leaves]  # type: ignore[attr-defined]
        for _ in range(2):
            found = kernel(*leaves)
            directions = [torch.randn_like(out) for out in found]
            torch.autograd.backward(found, directions)
            exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
            added = torch.autograd.grad(definition(*exact), exact, [d.double() for d in directions])
            wanted = [before + here for before, here in zip(wanted, added, strict=True)]
        for leaf, total in zip(leaves, wanted, strict=True):
            main: Tensor = leaf.main_grad  # type: ignore[attr-defined]
            assert leaf.grad_added_to_main_grad and leaf.grad is not None  # type: ignore[attr-defined]
            assert (main.double() - total).norm() <= SUMMED * total.norm()
            buffers.append(main)
    return buffers


def main() -> None:
    torch.manual_seed(1)
    cpu = torch.device("cpu")
    # The interpreter's time is that of the steps of all programs, of any size: few and large ones.
    tensor_product_gpu.BACKWARD = (8, 1, 2)
    sums_gpu.STEPS = 2
    tensor_products(cpu, torch.float16, 11, 16, biased=True, mixes=True)
    tensor_products(cpu, torch.float16, 3, 16, biased=False, mixes=False)
    mixed_values(cpu, torch.float16, 40)
    mixed_values(cpu, torch.float16, 40, apart=False)
    gradient_of_mix_in_its_buffer(cpu, torch.float16)
    gradients_are_added_to_those_so_far(cpu, torch.float16, 7)
    normed_projections(cpu, torch.float16, 19, 16, rotates=True)
    normed_projections(cpu, torch.float16, 3, 16, rotates=False)
    normed(cpu, torch.float16, 40, 24)
    normed(cpu, torch.float16, 40, 24, addends=2, readers=3)
    norm_of_which_only_some_is_read(cpu, torch.float16)
    totals(cpu, torch.float16, 3, 24)
    squared_relus(cpu, torch.float16, 3, 24, biased=False)
    squared_relus(cpu, torch.float16, 70, 24, biased=True)
    linear_maps(cpu, torch.float16, 150, 8, 24)
    embedded(cpu, torch.float16, 50, 9, 24)
    in_buffers(cpu, torch.float32, 35, 24)  # a CPU has no product of fp16 with an fp32 sum


if __name__ == "__main__":
    main()
