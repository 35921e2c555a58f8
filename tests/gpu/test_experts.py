"""The experts' grouped product on a GPU against float64, with experts that get no token."""

import pytest
import torch

from tests.fakes.students import new_seed
from vpmoe.model.grouped import grouped_product


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
