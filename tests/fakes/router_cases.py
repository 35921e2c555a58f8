"""The GPU's kernels of router and dispatch beside their definitions in float64.

    TRITON_INTERPRET=1 python -m tests.fakes.router_cases

runs them without a GPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vpmoe.model import dispatch_gpu, router_gpu
from vpmoe.model.router_gpu import Load, Rule

LARGE = Rule(experts=256, choices=4, groups=8, chosen_groups=4, scaling=2.5)
TWO_OF_A_GROUP = Rule(experts=8, choices=2, groups=4, chosen_groups=1, scaling=1.0)
TINY = Rule(experts=8, choices=2, groups=4, chosen_groups=2, scaling=2.5)

SUMS = 2e-5
"""Allowed relative error of the norm of what is not rounded to bf16: fp32, or two bf16 numbers (2⁻¹⁷)."""
ROUNDED = 5e-3
"""The same of bf16 results."""
APART = 1e-5
"""Least distance of a choice and the best that is left out: fp32 must not choose otherwise."""


@dataclass
class Wanted:
    """By the definition in float64, differentiable."""

    weight_NK: Tensor
    expert_NK: Tensor
    balance: Tensor
    tokens_E: Tensor


def definition(
    logits_NE: Tensor, selection_bias_E: Tensor, padding_N: Tensor, rows: int, rule: Rule
) -> Wanted:
    """Tokens are [positions, rows]."""
    score = logits_NE.sigmoid()
    _, expert_NK = _chosen(score + selection_bias_E, rule)
    value = score.gather(1, expert_NK)
    normal = score / score.sum(1, keepdim=True)
    picked = torch.zeros_like(score).scatter(1, score.topk(rule.choices).indices, 1.0)
    real = ~padding_N[:, None]
    normal_bE, picked_bE = ((x * real).view(-1, rows, rule.experts).sum(0) for x in (normal, picked))
    count_b = picked_bE.sum(1) / rule.choices
    share_bE = picked_bE / (rule.choices * count_b.clamp(min=1)[:, None])
    return Wanted(
        rule.scaling * value / value.sum(1, keepdim=True),
        expert_NK,
        rule.experts * (share_bE * normal_bE).sum(),
        (torch.zeros_like(score).scatter(1, expert_NK, 1.0) * real).sum(0),
    )


def _chosen(key: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """(distance of the last choice, of groups or experts, from the best that is left out [N], experts)."""
    by_group = key.view(len(key), rule.groups, -1)
    group = by_group.topk(rule.choices // rule.chosen_groups).values.sum(2)
    order = group.sort(descending=True)
    gap = order.values[:, rule.chosen_groups - 1] - order.values[:, rule.chosen_groups]
    among = torch.zeros_like(group, dtype=torch.bool).scatter(1, order.indices[:, : rule.chosen_groups], True)
    masked = by_group.masked_fill(~among[:, :, None], -torch.inf).flatten(1)
    best = masked.sort(descending=True)
    values = best.values[:, : rule.choices + 1]
    return torch.minimum(gap, values.diff().neg().min(1).values), best.indices[:, : rule.choices]


def clear_cases(logits_NE: Tensor, selection_bias_E: Tensor, rule: Rule) -> Tensor:
    """The tokens whose choices do not depend on rounding."""
    score = logits_NE.double().sigmoid()
    gap, _ = _chosen(score + selection_bias_E.double(), rule)
    best = score.topk(rule.choices + 1).values
    return ((gap > APART) & (best.diff().neg()[:, -1] > APART)).nonzero().squeeze(1)


def assert_near(found: Tensor, wanted: Tensor, error: float = SUMS) -> None:
    assert found.shape == wanted.shape
    assert (found.double() - wanted).norm() <= error * wanted.norm()


def chosen_from_logits(device: torch.device, positions: int, rows: int, rule: Rule, biased: bool) -> None:
    """The two kernels of the router, without its products."""
    tokens = positions * rows
    selection_bias = 0.1 * torch.randn(rule.experts, device=device)
    bias = torch.randn(rule.experts, device=device).half().requires_grad_() if biased else None
    added = 0 if bias is None else bias.detach().float()
    logits = 2 * torch.randn(2 * tokens + 20, rule.experts, device=device)
    logits = logits[clear_cases(logits + added, selection_bias, rule)[:tokens]]
    padding = torch.rand(positions, rows, device=device) < 0.2
    load = Load(torch.ones(rule.experts, device=device), torch.ones((), device=device))
    weight, expert, share = router_gpu.choose(
        logits, bias, selection_bias, padding, rule, load, balanced=True
    )
    direction = torch.randn_like(weight)
    halves, grad_bias = router_gpu.gradient_of_logits(
        logits, bias, padding, expert, direction, share, 0.7, rule
    )
    leaves = [logits.double().requires_grad_()]
    if bias is not None:
        leaves.append(bias.detach().double().requires_grad_())
    wanted = definition(sum(leaves), selection_bias.double(), padding.flatten(), rows, rule)  # type: ignore[arg-type]
    assert torch.equal(expert.long(), wanted.expert_NK)
    assert torch.equal(load.tokens_E.double(), 1 + wanted.tokens_E)
    assert_near(weight, wanted.weight_NK)
    assert_near(load.balance, 1 + wanted.balance)
    loss = (wanted.weight_NK * direction.double()).sum() + 0.7 * wanted.balance
    gradient, *by_bias = torch.autograd.grad(loss, leaves)
    assert_near(halves.double().view(tokens, 2, -1).sum(1), gradient)
    if grad_bias is not None:
        assert_near(grad_bias, by_bias[0], ROUNDED)
    evaluated = router_gpu.choose(logits, bias, selection_bias, padding, rule, None, balanced=False)
    assert torch.equal(evaluated[0], weight) and torch.equal(evaluated[1], expert)
    assert evaluated[2] is None


def first_of_equal_scores(device: torch.device, rule: Rule) -> None:
    """Of equal groups and experts the first are chosen, as by torch's stable sort, and each expert once."""
    # not −1, 0 and 1, whose scores of two experts can be nearly equal sums: s(1) + s(−1) and 2·s(0)
    logits = torch.tensor([-2.0, 0.0, 1.0], device=device)[
        torch.randint(3, (200, rule.experts), device=device)
    ]
    selection_bias = torch.randint(-1, 2, (rule.experts,), device=device).float()
    padding = torch.zeros(200, 1, dtype=torch.bool, device=device)
    _, expert, _ = router_gpu.choose(logits, None, selection_bias, padding, rule, None, balanced=False)
    key = logits.sigmoid() + selection_bias
    by_group = key.view(200, rule.groups, -1)
    group = by_group.sort(descending=True).values[..., : rule.choices // rule.chosen_groups].sum(2)
    order = group.sort(descending=True, stable=True).indices
    among = torch.zeros_like(group, dtype=torch.bool).scatter(1, order[:, : rule.chosen_groups], True)
    masked = by_group.masked_fill(~among[:, :, None], -torch.inf).flatten(1)
    wanted = masked.sort(descending=True, stable=True).indices[:, : rule.choices]
    assert torch.equal(expert.long(), wanted)


def sorted_choices(device: torch.device, choices: int, experts: int) -> None:
    """Of experts some of which have no choice."""
    expert = torch.randint(0, experts, (choices,), device=device, dtype=torch.int32) // 2 * 2
    order, inverse, tokens = dispatch_gpu.sorted_by_expert(expert, experts)
    assert torch.equal(order, expert.argsort(stable=True))
    assert torch.equal(order[inverse], torch.arange(choices, device=device))
    assert torch.equal(tokens, expert.long().bincount(minlength=experts))


def summed_rows(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> None:
    rows = torch.randn(4 * tokens, width, device=device).to(dtype)
    inverse = torch.randperm(4 * tokens, device=device)
    found = dispatch_gpu.sum_of_rows(rows, inverse, 4)
    assert found.dtype == dtype
    assert_near(found, rows.double()[inverse].view(tokens, 4, width).sum(1), ROUNDED)


def main() -> None:
    torch.manual_seed(1)
    cpu = torch.device("cpu")
    chosen_from_logits(cpu, 21, 2, TINY, biased=True)
    chosen_from_logits(cpu, 5, 1, TWO_OF_A_GROUP, biased=False)
    first_of_equal_scores(cpu, TINY)
    sorted_choices(cpu, 300, 10)
    sorted_choices(cpu, 1, 4)
    summed_rows(cpu, torch.float16, 5, 24)


if __name__ == "__main__":
    main()
