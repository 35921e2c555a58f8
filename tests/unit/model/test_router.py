"""The router's corrections of megatron-core: counts in fp32 without padding, the balance loss per row, biases
that move the right way."""

from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

from tests.fakes.students import SMALL, documents, learner, new_seed, ragged
from vpmoe.model.batch import Batch
from vpmoe.model.router import ExpertLoad, Router, routers
from vpmoe.model.student import Student, _config, _initialise
from vpmoe.objectives.vanilla import vanilla

NOTHING = {"reasoning": 0.0, "final": 0.0}
"""Span weights under which only the balance loss is left."""


def total(batches: list[Batch]) -> torch.Tensor:
    return torch.stack([batch.counts for batch in batches]).sum(0)


def test_counts_and_biases_are_fp32_in_a_bf16_student(device: torch.device) -> None:
    """bf16 cannot count past 256: biases would follow counts that stand still."""
    student = Student(
        SMALL, _config(SMALL, torch.device("cuda"), 1), sequence_length=2048
    )  # the GPU's configuration, on the shim's CPU
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


def test_padding_is_in_no_count_and_evaluation_counts_nothing(device: torch.device) -> None:
    batches = ragged(torch.Generator().manual_seed(new_seed()), 3)
    counts = total(batches)
    assert any(batch.padding.any() for batch in batches)
    it = learner(device)
    it.evaluate(batches)
    load = it.forward_backward(batches, vanilla(counts, NOTHING), int(counts[0])).load
    assert load.layers == ("layers.1", "layers.2")
    assert load.tokens.sum(1).tolist() == [int(counts[0]) * SMALL.experts_per_token] * 2
    it.step(0.0)
    assert (
        it.forward_backward(batches, vanilla(counts, NOTHING), int(counts[0])).load.tokens.sum()
        == load.tokens.sum()
    )


def test_biases_rise_for_the_underused_and_fall_for_the_overused(device: torch.device) -> None:
    batches = ragged(torch.Generator().manual_seed(new_seed()), 3)
    counts = total(batches)
    it = learner(device)
    load = it.forward_backward(batches, vanilla(counts, NOTHING), int(counts[0])).load
    it.step(0.0)
    for router, tokens in zip(routers(it.student).values(), load.tokens.double(), strict=True):
        assert torch.equal(
            router.expert_bias, (tokens.mean() - tokens).sign().float() * SMALL.bias_update_rate
        )


def test_routing_is_group_limited_and_weighs_by_the_scores_alone(device: torch.device) -> None:
    """Biases choose; weights are the chosen sigmoids, normalised, times 2.5. Groups by their best, then
    experts in them."""
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
        assert set(chosen[n].nonzero().flatten().tolist()) == set(want.tolist())
        torch.testing.assert_close(
            weights[n, want].double(), 2.5 * scores[n, want] / scores[n, want].sum(), rtol=1e-5, atol=1e-6
        )


def test_the_balance_losss_gradient_is_float64s_whatever_is_masked_or_padded(device: torch.device) -> None:
    """Of the last router, whose weights nothing else reaches: coefficient · Σ_rows n_row/P · E · Σ_e f·p,
    from the router's own inputs."""
    batches = ragged(torch.Generator().manual_seed(new_seed()), 3)
    positions = int(total(batches)[0])
    it = learner(device, replace(SMALL, aux_coefficient=0.3))
    router = routers(it.student)["layers.2"]
    seen: list[torch.Tensor] = []
    handle = router.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().double()))
    outcome = it.forward_backward(batches, vanilla(total(batches), NOTHING), positions)
    handle.remove()
    weight = router.weight.detach().double().requires_grad_()
    mean = torch.zeros((), dtype=torch.float64)
    for batch, inputs in zip(batches, seen, strict=True):
        for row in range(len(batch.tokens)):
            scores = torch.sigmoid(inputs[:, row][~batch.padding[row]] @ weight.T)
            scores = scores / scores.sum(1, keepdim=True)
            share = (
                torch.zeros_like(scores).scatter(1, scores.topk(SMALL.experts_per_token).indices, 1.0).mean(0)
                / SMALL.experts_per_token
            )
            mean = mean + len(scores) / positions * SMALL.experts * (share * scores.mean(0)).sum()
    (0.3 * mean).backward()
    torch.testing.assert_close(
        router.weight.main_grad.double() / positions, weight.grad, rtol=1e-4, atol=1e-9
    )
    assert outcome.load.aux[1].item() == pytest.approx(mean.item(), rel=1e-6)


def test_the_balance_loss_is_megatrons_where_that_is_right(device: torch.device) -> None:
    """One row without padding: the same gradient, attached with the same weight."""
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
def test_load(tokens: list[int], max_over_mean: float, dead: int) -> None:
    load = ExpertLoad(("layers.1",), torch.tensor([tokens]), torch.ones(1))
    assert load.max_over_mean.tolist() == [max_over_mean] and load.dead.tolist() == [dead]
