"""The experts' grouped product: empty groups have gradient zero, also where the kernel leaves garbage."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fakes.students import new_seed
from vpmoe.model import grouped
from vpmoe.model.grouped import (
    clear_gradient_of_empty_groups,
    grouped_product,
    grouped_product_with_bias,
    leaves_empty_groups_unset,
    rows_of,
)

ROWS = {
    "first-empty": [0, 3, 4],
    "last-empty": [3, 4, 0],
    "several-empty": [0, 5, 0, 0, 2, 0],
    "one-row": [0, 0, 1, 0],
    "none-empty": [1, 2, 3],
    "all-empty": [0, 0, 0],
}


class GarbageGradient(torch.autograd.Function):
    """The product of a GPU from Blackwell on: the gradient of an empty group's matrix is left as it was in
    memory. No GPU here shows it, and memory is garbage only by chance."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        return torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, ends = ctx.saved_tensors
        of_rows, of_weight = torch.empty_like(rows), torch.full_like(weight, torch.nan)
        start = 0
        for group, stop in enumerate(ends.tolist()):
            of_rows[start:stop] = gradient[start:stop] @ weight[group]
            if stop > start:
                of_weight[group] = gradient[start:stop].T @ rows[start:stop]
            start = stop
        return of_rows, of_weight, None


def random_inputs(rows: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows, weights, ends, a gradient of the output)."""
    torch.manual_seed(new_seed())
    inputs, weight = torch.randn(sum(rows), 8), torch.randn(len(rows), 16, 8)
    ends = torch.tensor(rows).cumsum(0).int()
    return inputs.requires_grad_(), weight.requires_grad_(), ends, torch.randn(sum(rows), 16)


def reference(
    rows: list[int], inputs: Tensor, weight: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output and both gradients, group by group in float64."""
    exact = [x.detach().double().requires_grad_() for x in (inputs, weight)]
    out = torch.cat([x @ w.T for x, w in zip(exact[0].split(rows), exact[1], strict=True)])
    out.backward(direction.double())
    return out.detach(), exact[0].grad, exact[1].grad


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_the_product_and_its_gradients_equal_those_of_each_group(rows: list[int]) -> None:
    inputs, weight, ends, direction = random_inputs(rows)
    found = grouped_product(inputs, weight, ends)
    found.backward(direction)
    wanted = reference(rows, inputs, weight, direction)
    for one, other in zip((found, inputs.grad, weight.grad), wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_biases_and_their_gradients_equal_those_of_each_group(rows: list[int]) -> None:
    inputs, weight, ends, direction = random_inputs(rows)
    leaves = [inputs, weight, torch.randn(len(rows) * 16), torch.randn(len(rows) * 8), torch.rand(sum(rows))]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    x, w, down, up, share = leaves
    found = grouped_product_with_bias(x + rows_of(up, ends, sum(rows)), w, down, share, ends)
    x, w, down, up, share = exact
    group = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
    wanted = torch.einsum("ni,noi->no", x + up.view(-1, 8)[group], w[group])
    wanted = wanted + share.unsqueeze(1) * down.view(-1, 16)[group]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    gradients = (
        torch.autograd.grad(out, of, to)
        for out, of, to in ((found, leaves, direction), (wanted, exact, direction.double()))
    )
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_garbage_in_the_gradient_of_empty_experts_is_cleared(rows: list[int]) -> None:
    """As on Blackwell GPUs: pytorch/pytorch issue 172439."""
    inputs, weight, ends, direction = random_inputs(rows)
    GarbageGradient.apply(inputs, weight, ends).backward(direction)
    assert weight.grad is not None
    assert weight.grad.isnan().flatten(1).any(1).tolist() == [count == 0 for count in rows]
    weight.grad = inputs.grad = None
    GarbageGradient.apply(inputs, clear_gradient_of_empty_groups(weight, ends), ends).backward(direction)
    assert weight.grad is not None and inputs.grad is not None
    _, of_inputs, of_weight = reference(rows, inputs, weight, direction)
    torch.testing.assert_close(weight.grad.double(), of_weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs.grad.double(), of_inputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "device, capability, unset",
    [
        ("cpu", None, False),
        ("cuda", (8, 0), False),
        ("cuda", (9, 0), False),
        ("cuda", (10, 0), True),
        ("cuda", (10, 3), True),
        ("cuda", (12, 0), True),
    ],
)
def test_gradients_are_cleared_from_blackwell_on(
    monkeypatch: pytest.MonkeyPatch, device: str, capability: tuple[int, int] | None, unset: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert leaves_empty_groups_unset(torch.device(device)) is unset


@pytest.mark.parametrize("training", [True, False])
def test_the_product_clears_gradients_only_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    cleared = []
    monkeypatch.setattr(grouped, "leaves_empty_groups_unset", lambda _: True)
    monkeypatch.setattr(
        grouped, "clear_gradient_of_empty_groups", lambda weight, _: cleared.append(weight) or weight
    )
    inputs, weight, ends, _ = random_inputs([1, 0, 2])
    with torch.set_grad_enabled(training):
        grouped_product(inputs, weight, ends)
    assert len(cleared) == training
