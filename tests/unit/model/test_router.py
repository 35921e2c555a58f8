"""The router's corrections of megatron-core: counts in fp32 without padding, a balance loss per row, and the
direction of bias updates."""

from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

from tests.fakes.students import SMALL, documents, learner, new_seed, ragged_batches
from vpmoe.model.batch import Batch
from vpmoe.model.router import ExpertLoad, Router, routers
from vpmoe.model.student import Student, _config, _initialise
from vpmoe.objectives.vanilla import vanilla

NO_SPANS = {"reasoning": 0.0, "final": 0.0}
"""Span weights that leave only the balance loss."""


def total_counts(batches: list[Batch]) -> torch.Tensor:
    return torch.stack([batch.counts for batch in batches]).sum(0)


def test_counts_and_biases_are_fp32_in_a_bf16_student(device: torch.device) -> None:
    """bf16 cannot count past 256: biases would follow counts that no longer increase."""
    student = Student(
        SMALL, _config(SMALL, torch.device("cuda"), 1), sequence_length=2048
    )  # the configuration of a GPU, on the patched CPU
    _initialise(student, 0)
    batch = Batch.from_rows(*documents(torch.Generator().manual_seed(0), [2000], 2048))
    assert student(batch).dtype == torch.bfloat16 and student.output.dtype == torch.bfloat16
    for router in routers(student).values():
        assert router.weight.dtype == torch.bfloat16
        assert (
            router.local_tokens_per_expert.dtype
            == router.expert_bias.dtype
            == router.aux_sum.dtype
            == torch.float32
        )
        assert router.local_tokens_per_expert.sum() == 2000 * SMALL.experts_per_token


def test_neither_padding_nor_evaluation_is_counted(device: torch.device) -> None:
    batches = ragged_batches(torch.Generator().manual_seed(new_seed()), 3)
    counts = total_counts(batches)
    assert any(batch.padding.any() for batch in batches)
    it = learner(device)
    it.evaluate(batches)
    load = it.forward_backward(batches, vanilla(counts, NO_SPANS), int(counts[0])).load
    assert load.layers == ("layers.1", "layers.2")
    assert load.tokens.sum(1).tolist() == [int(counts[0]) * SMALL.experts_per_token] * 2
    it.step(0.0)
    assert (
        it.forward_backward(batches, vanilla(counts, NO_SPANS), int(counts[0])).load.tokens.sum()
        == load.tokens.sum()
    )


def test_biases_rise_for_underused_and_fall_for_overused_experts(device: torch.device) -> None:
    batches = ragged_batches(torch.Generator().manual_seed(new_seed()), 3)
    counts = total_counts(batches)
    it = learner(device)
    load = it.forward_backward(batches, vanilla(counts, NO_SPANS), int(counts[0])).load
    it.step(0.0)
    for router, tokens in zip(routers(it.student).values(), load.tokens.double(), strict=True):
        assert torch.equal(
            router.expert_bias, (tokens.mean() - tokens).sign().float() * SMALL.bias_update_rate
        )


def test_routing_is_group_limited_and_weights_ignore_the_biases(device: torch.device) -> None:
    """Biases affect only the selection, first of groups by their best experts, then of experts in them.
    Weights are the normalised sigmoids of the selected experts, times 2.5."""
    torch.manual_seed(new_seed())
    router = routers(learner(device).student)["layers.2"]
    router.expert_bias.normal_(0, 0.1)
    inputs = torch.randn(50, 1, SMALL.hidden) * 5
    weights, chosen = router(inputs, padding_mask=torch.zeros(50, 1, dtype=torch.bool))
    scores = torch.sigmoid(inputs[:, 0].double() @ router.weight.double().T)
    for n in range(50):
        biased = (scores[n] + router.expert_bias).view(SMALL.expert_groups, -1)
        groups = (
            biased.topk(SMALL.experts_per_token // SMALL.expert_groups_per_token)
            .values.sum(1)
            .topk(SMALL.expert_groups_per_token)
            .indices
        )
        masked = torch.full_like(biased, -torch.inf)
        masked[groups] = biased[groups]
        want = masked.flatten().topk(SMALL.experts_per_token).indices
        want = want.sort().values  # the CPU's order
        assert torch.equal(chosen[n], want)
        torch.testing.assert_close(
            weights[n].double(), 2.5 * scores[n, want] / scores[n, want].sum(), rtol=1e-5, atol=1e-6
        )


def test_the_gradient_of_the_balance_loss_equals_float64_with_masks_and_padding(device: torch.device) -> None:
    """coefficient · Σ_rows n_row/P · E · Σ_e f·p, from the inputs of the last router, whose weights get no
    other gradient."""
    batches = ragged_batches(torch.Generator().manual_seed(new_seed()), 3)
    positions = int(total_counts(batches)[0])
    it = learner(device, replace(SMALL, aux_coefficient=0.3))
    router = routers(it.student)["layers.2"]
    seen: list[torch.Tensor] = []
    handle = router.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().double()))
    outcome = it.forward_backward(batches, vanilla(total_counts(batches), NO_SPANS), positions)
    handle.remove()
    weight = router.weight.detach().double().requires_grad_()
    mean = torch.zeros((), dtype=torch.float64)
    for batch, inputs in zip(batches, seen, strict=True):
        for row in range(len(batch.tokens)):
            scores = torch.sigmoid(inputs[:, row][~batch.padding[row]] @ weight.T)
            scores = scores / scores.sum(1, keepdim=True)
            fraction = (
                torch.zeros_like(scores).scatter(1, scores.topk(SMALL.experts_per_token).indices, 1.0).mean(0)
                / SMALL.experts_per_token
            )
            mean = mean + len(scores) / positions * SMALL.experts * (fraction * scores.mean(0)).sum()
    (0.3 * mean).backward()
    torch.testing.assert_close(
        router.weight.main_grad.double() / positions, weight.grad, rtol=1e-4, atol=1e-9
    )
    assert outcome.load.aux[1].item() == pytest.approx(mean.item(), rel=1e-6)


def test_the_balance_loss_of_one_row_without_padding_equals_megatrons(device: torch.device) -> None:
    """For one row without padding, megatron-core's gradient and its weight are right."""
    torch.manual_seed(new_seed())
    router = routers(learner(device, replace(SMALL, aux_coefficient=0.3)).student)["layers.1"]
    logits = torch.randn(40, SMALL.experts).requires_grad_()
    scores = torch.sigmoid(logits) / torch.sigmoid(logits).sum(1, keepdim=True)
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(SMALL.experts_per_token).indices, 1.0).bool()
    gradients = []
    for balance in (Router._apply_seq_aux_loss, TopKRouter._apply_seq_aux_loss):
        attached = balance(
            router, scores.detach().requires_grad_(), scores, chosen, 40, 1, with_padding_mask=True
        )
        gradients.append(torch.autograd.grad(attached.sum() * 0, logits, retain_graph=True)[0])
    assert gradients[0].norm() > 0
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "tokens, max_over_mean, dead",
    [
        pytest.param([5, 5, 5, 5], 1.0, 0, id="balanced"),
        pytest.param([20, 0, 0, 0], 4.0, 3, id="collapsed"),
        pytest.param([0, 0, 0, 0], 0.0, 4, id="no-tokens"),
    ],
)
def test_expert_load_counts_imbalance_and_dead_experts(
    tokens: list[int], max_over_mean: float, dead: int
) -> None:
    load = ExpertLoad(("layers.1",), torch.tensor([tokens]), torch.ones(1))
    assert load.max_over_mean.tolist() == [max_over_mean] and load.dead.tolist() == [dead]
