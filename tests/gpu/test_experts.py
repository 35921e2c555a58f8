"""The experts' grouped product and biases on a GPU against float64, with experts that get no token."""

import pytest
import torch

from tests.fakes.students import new_seed
from vpmoe.model.grouped import grouped_product, grouped_product_with_bias, rows_of


@pytest.mark.parametrize("rows", [[162, 0, 2577, 446, 0, 83], [0, 0, 0, 7], [0, 0, 0, 0]], ids=str)
def test_empty_experts_have_gradient_zero(gpu: torch.device, rows: list[int]) -> None:
    torch.manual_seed(new_seed())
    inputs = torch.randn(sum(rows), 256, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(len(rows), 128, 256, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    direction = torch.randn(sum(rows), 128, device=gpu, dtype=torch.bfloat16)
    # what the allocator hands out next for the gradient is not zero
    dirty = [torch.full_like(weight, torch.nan) for _ in range(4)]
    del dirty
    ends = torch.tensor(rows, device=gpu).cumsum(0, dtype=torch.int32)
    grouped_product(inputs, weight, ends).backward(direction)
    exact = [x.detach().double().requires_grad_() for x in (inputs, weight)]
    wanted = torch.cat([x @ w.T for x, w in zip(exact[0].split(rows), exact[1], strict=True)])
    wanted.backward(direction.double())
    assert weight.grad is not None and exact[1].grad is not None
    assert (weight.grad[torch.tensor(rows) == 0] == 0).all()
    assert (weight.grad.double() - exact[1].grad).norm() <= 2e-2 * exact[1].grad.norm()


@pytest.mark.parametrize("rows", [[162, 0, 2577, 446, 0, 83], [0, 0, 0, 7], [0, 0, 0, 0]], ids=str)
def test_biases_equal_float64(gpu: torch.device, rows: list[int]) -> None:
    """Outputs and gradients; those of empty experts are 0. Inputs are exact in bf16 but for the shares."""
    torch.manual_seed(new_seed())
    groups, total = len(rows), sum(rows)
    sizes = [(total, 128), (groups, 256, 128), (groups * 256,), (groups * 128,)]
    inputs = [torch.randn(*size, device=gpu, dtype=torch.bfloat16).requires_grad_() for size in sizes]
    share = torch.rand(total, device=gpu).requires_grad_()
    ends = torch.tensor(rows, device=gpu).cumsum(0, dtype=torch.int32)
    direction = torch.randn(total, 256, device=gpu, dtype=torch.bfloat16)
    dirty = [torch.full_like(inputs[1], torch.nan) for _ in range(4)]
    del dirty
    leaves = [*inputs, share]
    x, weight, down, up = inputs
    found = grouped_product_with_bias(x + rows_of(up, ends, total), weight, down, share, ends)
    gradients = torch.autograd.grad(found, leaves, direction)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    x, weight, down, up, share = exact
    expert = torch.arange(groups, device=gpu).repeat_interleave(torch.tensor(rows, device=gpu))
    inner = (x + up.view(groups, -1)[expert]).split(rows)
    wanted = torch.cat([x @ w.T for x, w in zip(inner, weight, strict=True)])
    wanted = wanted + share.unsqueeze(1) * down.view(groups, -1)[expert]
    for one, other in zip(
        (found, *gradients), (wanted, *torch.autograd.grad(wanted, exact, direction.double())), strict=True
    ):
        assert (one.double() - other).norm() <= 1e-2 * other.norm()
    empty = torch.tensor(rows, device=gpu) == 0
    assert all((gradient.reshape(groups, -1)[empty] == 0).all() for gradient in gradients[1:4])


def test_gradients_of_biases_are_the_same_in_each_call(gpu: torch.device) -> None:
    """With as many rows as a microbatch of 32,768 tokens has: an embedding's backward adds so many
    atomically."""
    torch.manual_seed(new_seed())
    rows = torch.randint(0, 1024, (256,), device=gpu)
    total, ends = int(rows.sum()), rows.cumsum(0, dtype=torch.int32)
    bias = torch.randn(256 * 128, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    direction = torch.randn(total, 128, device=gpu, dtype=torch.bfloat16)
    first, *others = (torch.autograd.grad(rows_of(bias, ends, total), bias, direction)[0] for _ in range(5))
    assert all(torch.equal(first, other) for other in others)
