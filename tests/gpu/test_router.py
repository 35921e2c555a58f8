"""Router and dispatch on a GPU: equal to float64, repeatable, nothing compiled by lengths.

Compiling takes most of the time, so not every rule is tried with and without bias.
"""

import pytest
import torch
import triton
from torch import Tensor

from tests.fakes.router_cases import (
    LARGE,
    ROUNDED,
    SUMS,
    TINY,
    TWO_OF_A_GROUP,
    assert_near,
    chosen_from_logits,
    clear_cases,
    definition,
    first_of_equal_scores,
    sorted_choices,
    summed_rows,
)
from tests.fakes.students import new_seed
from vpmoe.model.dispatch_gpu import sum_of_rows
from vpmoe.model.router_gpu import Load, Rule, route


@pytest.mark.parametrize(
    "rule, biased",
    [
        pytest.param(LARGE, False, id="large"),
        pytest.param(TINY, True, id="tiny-bias"),
        pytest.param(TWO_OF_A_GROUP, False, id="two-of-a-group"),
    ],
)
@pytest.mark.parametrize("positions, rows", [(1, 1), (1000, 1), (333, 3)])
def test_choices_and_gradients_of_logits_equal_float64(
    gpu: torch.device, positions: int, rows: int, rule: Rule, biased: bool
) -> None:
    torch.manual_seed(new_seed())
    chosen_from_logits(gpu, positions, rows, rule, biased)


@pytest.mark.parametrize("rule", [LARGE, TWO_OF_A_GROUP], ids=["large", "two-of-a-group"])
def test_of_equal_scores_the_first_are_chosen(gpu: torch.device, rule: Rule) -> None:
    torch.manual_seed(new_seed())
    first_of_equal_scores(gpu, rule)


def random_inputs(gpu: torch.device, positions: int, rows: int, rule: Rule) -> list[Tensor]:
    """Hidden states, weight, bias, selection bias and padding; the choices do not depend on rounding."""
    hidden = torch.randn(2 * positions * rows, 1024, device=gpu, dtype=torch.bfloat16)
    weight = (0.05 * torch.randn(rule.experts, 1024, device=gpu)).bfloat16()
    bias, selection_bias = torch.randn(rule.experts, device=gpu).bfloat16(), torch.zeros(rule.experts).to(gpu)
    selection_bias.normal_(0, 0.1)
    logits = hidden.double() @ weight.double().T + bias.double()
    hidden = hidden[clear_cases(logits, selection_bias, rule)[: positions * rows]]
    padding = torch.rand(positions, rows, device=gpu) < 0.2
    return [*(x.requires_grad_() for x in (hidden, weight, bias)), selection_bias, padding]


def run(inputs: list[Tensor], rule: Rule, direction: Tensor) -> list[Tensor]:
    """Weights, experts, balance loss, tokens of each expert and the gradients of hidden, weight and bias, of
    a loss to which 30 times the balance loss is added."""
    load = Load(torch.zeros(rule.experts).to(direction), torch.zeros(()).to(direction))
    hidden, router_weight, bias, selection_bias, padding = inputs
    weight, expert = route(hidden, router_weight, bias, selection_bias, padding, rule, load, coefficient=30.0)
    loss = (weight * direction).sum()
    return [weight, expert, load.balance, load.tokens_E, *torch.autograd.grad(loss, inputs[:3])]


@pytest.mark.parametrize("rule", [LARGE, TINY], ids=["large", "tiny"])
def test_the_router_equals_float64(gpu: torch.device, rule: Rule) -> None:
    """Tensor cores give the logits of fp32: weights are as near to float64 as fp32's are."""
    torch.manual_seed(new_seed())
    inputs = random_inputs(gpu, 1500, 2, rule)
    direction = torch.randn(3000, rule.choices, device=gpu)
    found = run(inputs, rule, direction)
    exact = [x.detach().double().requires_grad_() for x in inputs[:3]]
    hidden, weight, bias = exact
    wanted = definition(hidden @ weight.T + bias, inputs[3].double(), inputs[4].flatten(), 2, rule)
    loss = (wanted.weight_NK * direction.double()).sum() + 30 * wanted.balance
    assert torch.equal(found[1].long(), wanted.expert_NK)
    assert torch.equal(found[3].double(), wanted.tokens_E)
    assert_near(found[0], wanted.weight_NK, SUMS)
    assert_near(found[2], wanted.balance, SUMS)
    for one, other in zip(found[4:], torch.autograd.grad(loss, exact), strict=True):
        assert_near(one, other, ROUNDED)


@pytest.mark.parametrize("choices, experts", [(1, 8), (128, 8), (5000, 256), (131_072, 256), (700, 24)])
def test_choices_are_sorted_by_expert(gpu: torch.device, choices: int, experts: int) -> None:
    torch.manual_seed(new_seed())
    sorted_choices(gpu, choices, experts)


@pytest.mark.parametrize("tokens, width", [(1, 16), (777, 1024), (50, 3000)])
def test_rows_are_summed(gpu: torch.device, tokens: int, width: int) -> None:
    torch.manual_seed(new_seed())
    summed_rows(gpu, torch.bfloat16, tokens, width)


def test_gradients_are_added_to_fp32_buffers(gpu: torch.device) -> None:
    torch.manual_seed(new_seed())
    inputs = random_inputs(gpu, 333, 3, LARGE)
    direction = torch.randn(999, LARGE.choices, device=gpu)
    wanted = run(inputs, LARGE, direction)[-2:]
    before = [torch.randn(weight.shape, device=gpu) for weight in inputs[1:3]]
    for weight, main in zip(inputs[1:3], before, strict=True):
        weight.main_grad = main.clone()  # type: ignore[attr-defined]
    for _ in range(2):
        run(inputs, LARGE, direction)
    for weight, main, gradient in zip(inputs[1:3], before, wanted, strict=True):
        added = weight.main_grad - main  # type: ignore[attr-defined]
        assert (added - 2 * gradient.float()).norm() <= ROUNDED * added.norm()


def test_results_are_the_same_in_each_call(gpu: torch.device) -> None:
    torch.manual_seed(new_seed())
    inputs = random_inputs(gpu, 8192, 2, LARGE)
    direction = torch.randn(16_384, LARGE.choices, device=gpu)
    first = run(inputs, LARGE, direction)
    rows, inverse = torch.randn(4000, 1024, device=gpu).bfloat16(), torch.randperm(4000, device=gpu)
    first.append(sum_of_rows(rows, inverse, 4))
    for _ in range(4):
        again = [*run(inputs, LARGE, direction), sum_of_rows(rows, inverse, 4)]
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_other_numbers_of_tokens_compile_nothing(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(positions: int, rows: int) -> None:
        inputs = random_inputs(gpu, positions, rows, LARGE)
        run(inputs, LARGE, torch.randn(positions * rows, LARGE.choices, device=gpu))
        sorted_choices(gpu, positions * rows, LARGE.experts)
        summed_rows(gpu, torch.bfloat16, positions * rows, 1024)

    everything(100, 3)
    compiled: list[object] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **details: compiled.append(details)
    )
    for positions, rows in ((1, 1), (16, 1), (17, 2), (2048, 1), (1000, 4)):
        everything(positions, rows)
    assert not compiled
