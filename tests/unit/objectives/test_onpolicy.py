"""On-policy coefficients equal those in float64, a step changes a token's probability in the right direction,
and a coefficient does not depend on other tokens."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.fakes.students import learner, new_seed, ragged_batches
from vpmoe.data.spans import SPANS
from vpmoe.model.batch import Batch
from vpmoe.model.head import target_logp
from vpmoe.model.learner import Learner
from vpmoe.objectives.onpolicy import on_policy
from vpmoe.objectives.vanilla import vanilla

WEIGHTS = {"reasoning": 0.7, "final": 1.6}


def logp(it: Learner, batch: Batch) -> Tensor:
    """The student's log p of the batch's targets, [T]; NaN where there is no target."""
    with torch.no_grad():
        return target_logp(it.student(batch), it.student.output, batch.target)


def rollouts(it: Learner, generator: torch.Generator, microbatches: int) -> list[Batch]:
    """Ragged microbatches. The sampler's log p differs from the student's by a few nats, the teacher's by up
    to 60."""
    batches = []
    for batch in ragged_batches(generator, microbatches):
        own_T = logp(it, batch)
        off_2T = torch.randn(2, len(own_T), generator=generator)
        batches.append(replace(batch, teacher_logp=own_T + 15 * off_2T[0], sampler_logp=own_T + off_2T[1]))
    return batches


def total_counts(batches: list[Batch]) -> Tensor:
    return torch.stack([batch.counts for batch in batches]).sum(0)


def ratio_times_advantage(logp_s: float, teacher: float, sampler: float) -> float:
    """ρ · a: truncated ratio times bounded advantage (design §6)."""
    return min(math.exp(logp_s - sampler), 2) * min(max(teacher - logp_s, -20), 20)


def reference_loss(batches: list[Batch], logits: list[Tensor], counts: Tensor) -> Tensor:
    """The loss in float64, token by token."""
    names = {number: name for name, number in SPANS.items()}
    loss = torch.zeros((), dtype=torch.float64)
    for batch, logits_TV in zip(batches, logits, strict=True):
        assert batch.teacher_logp is not None and batch.sampler_logp is not None
        for t in (batch.span > 0).nonzero().squeeze(1).tolist():
            span = int(batch.span[t])
            logp_s = logits_TV[t].log_softmax(0)[batch.target[t]]
            c = (
                WEIGHTS[names[span]]
                / int(counts[span])
                * ratio_times_advantage(
                    logp_s.item(), float(batch.teacher_logp[t]), float(batch.sampler_logp[t])
                )
            )
            loss = loss - c * logp_s
    return loss


def test_loss_and_gradients_over_ragged_microbatches_equal_float64(device: torch.device) -> None:
    """Tolerance: coefficients of both signs nearly cancel in sums over some hundred tokens, and fp32 rounds
    each sum by 1e-6 of the terms' size."""
    it = learner(device)
    batches = rollouts(it, torch.Generator().manual_seed(new_seed()), 3)
    counts = total_counts(batches)
    outcome = it.forward_backward(batches, on_policy(counts, WEIGHTS), int(counts[0]))
    gradient = it.student.output.main_grad.clone() / int(counts[0])  # type: ignore[attr-defined]
    with torch.no_grad():
        hidden = [it.student(batch).double() for batch in batches]
    output = it.student.output.detach().double().requires_grad_()
    loss = reference_loss(batches, [h @ output.T for h in hidden], counts)
    loss.backward()
    assert outcome.loss == pytest.approx(loss.item(), rel=1e-4, abs=1e-3)
    assert output.grad is not None
    torch.testing.assert_close(gradient.double(), output.grad, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    "preference", [pytest.param(3.0, id="teacher-prefers-it"), pytest.param(-3.0, id="teacher-disfavours-it")]
)
@pytest.mark.parametrize(
    "sampler", [pytest.param(0.0, id="sampled-by-this-version"), pytest.param(0.5, id="by-an-older-version")]
)
def test_a_step_raises_the_probability_of_a_token_exactly_if_the_teacher_prefers_it(
    preference: float, sampler: float, device: torch.device
) -> None:
    it = learner(device)
    (batch,) = ragged_batches(torch.Generator().manual_seed(new_seed()), 1)
    before_T = logp(it, batch)
    chosen = int((batch.span > 0).nonzero()[0])
    teacher_T = before_T.clone()
    teacher_T[chosen] += preference
    rollout = replace(batch, teacher_logp=teacher_T, sampler_logp=before_T + sampler)
    it.forward_backward([rollout], on_policy(batch.counts, WEIGHTS), int(batch.counts[0]))
    it.step(1e-4)
    assert (logp(it, batch)[chosen] - before_T[chosen]).sign() == math.copysign(1, preference)


def test_a_student_equal_to_its_teacher_has_no_gradient(device: torch.device) -> None:
    """Up to the rounding of fp32: the gradient is less than a millionth of that of a Vanilla step on the same
    batch."""
    it = learner(device)
    batches = [
        replace(b, teacher_logp=logp(it, b), sampler_logp=logp(it, b))
        for b in ragged_batches(torch.Generator().manual_seed(new_seed()), 3)
    ]
    counts = total_counts(batches)
    norms = []
    for objective in (on_policy(counts, WEIGHTS), vanilla(counts, WEIGHTS)):
        outcome = it.forward_backward(batches, objective, int(counts[0]))
        norms.append(float(it.student.output.main_grad.norm()))  # type: ignore[attr-defined]
        if outcome.measures:
            assert outcome.loss == pytest.approx(0, abs=1e-5)
            assert all(
                abs(kl[span]) < 1e-6
                for kl in (outcome.measures.reverse_kl, outcome.measures.sampler_kl)  # type: ignore[attr-defined]
                for span in SPANS
            )
    assert norms[0] < 1e-6 * norms[1]


def one_row(sampler: list[float], teacher: list[float]) -> Batch:
    """One row of a prompt token and sampled tokens, which alternate between reasoning and final."""
    length = len(sampler) + 1
    spans = torch.tensor([[0, *(1 + i % 2 for i in range(length - 1))]], dtype=torch.uint8)
    stored = (torch.tensor([[math.nan, *values]]) for values in (teacher, sampler))
    return Batch.from_rows(
        torch.arange(length).view(1, -1), spans, torch.zeros(1, length, dtype=torch.int32), *stored
    )


def coefficients(
    batch: Batch, logp_s: list[float], counts: Tensor | None = None, weights: dict[str, float] = WEIGHTS
) -> list[float]:
    rows_t = torch.arange(len(logp_s))
    found = on_policy(batch.counts if counts is None else counts, weights).coefficient_of(batch)(
        torch.tensor(logp_s), rows_t
    )
    return [float(c) for c in found]


@pytest.mark.parametrize(
    "logp_s, teacher, sampler, expected",
    [
        pytest.param(-2.0, -1.5, -2.0, 0.5, id="plain"),
        pytest.param(-2.0, -2.0, -2.0, 0.0, id="agreed"),
        pytest.param(-1.0, -100.0, -1.0, -20.0, id="advantage-at-its-lower-bound"),
        pytest.param(-100.0, -0.5, -100.0, 20.0, id="at-its-upper"),
        pytest.param(-21.0, -1.0, -21.0, 20.0, id="exactly-at-its-bound"),
        pytest.param(-1.0, -2.0, -3.0, -2.0, id="ratio-at-its-bound"),
        pytest.param(-1.0, -2.0, -100.0, -2.0, id="ratio-beyond-the-exponents-of-fp32"),
        pytest.param(-3.0, -2.0, -1.0, math.exp(-2), id="ratio-has-no-lower-bound"),
        pytest.param(-1.0, -100.0, -100.0, -40.0, id="both-bounds"),
        pytest.param(-1.0, -math.inf, -1.0, -20.0, id="impossible-for-the-teacher"),
    ],
)
def test_the_coefficient_of_a_token(logp_s: float, teacher: float, sampler: float, expected: float) -> None:
    assert ratio_times_advantage(logp_s, teacher, sampler) == pytest.approx(expected)
    batch = one_row([sampler, -1.0], [teacher, -1.0])
    assert coefficients(batch, [logp_s, -1.0]) == pytest.approx(
        [WEIGHTS["reasoning"] * expected, 0.0], rel=1e-6
    )


def test_spans_have_their_own_weights_and_counts() -> None:
    batch = one_row([-2.0] * 3, [-1.0] * 3)  # reasoning, final, reasoning
    assert coefficients(batch, [-2.0] * 3) == pytest.approx([0.35, 1.6, 0.35])
    assert coefficients(batch, [-2.0] * 3, weights={"reasoning": 1.0, "final": 0.0}) == pytest.approx(
        [0.5, 0.0, 0.5]
    )
    assert coefficients(batch, [-2.0] * 3, counts=torch.tensor([99, 70, 16])) == pytest.approx(
        [0.01, 0.1, 0.01]
    )
    assert coefficients(batch, [-2.0] * 3, counts=torch.tensor([99, 2, 0])) == pytest.approx(
        [0.35, 1.6, 0.35]
    )


def test_other_documents_affect_a_coefficient_only_through_the_counts() -> None:
    """A coefficient has no mean, deviation or rank of the batch: with equal counts, its bits are equal."""
    seed = new_seed()
    generator = torch.Generator().manual_seed(seed)
    sampler, teacher, own = ((-8 * torch.rand(6, generator=generator)).tolist() for _ in range(3))
    short = one_row(sampler[:4], teacher[:4])
    longer = one_row([*sampler[:4], *sampler], [*teacher[:4], *(5 * expected for expected in teacher)])
    fixed_counts = coefficients(short, own[:4], counts=torch.tensor([9, 4, 4]))
    assert coefficients(longer, [*own[:4], *own], counts=torch.tensor([9, 4, 4]))[:4] == fixed_counts
    scaled = [c * 5 / 2 for c in coefficients(longer, [*own[:4], *own])[:4]]
    assert coefficients(short, own[:4]) == pytest.approx(scaled, rel=1e-6)


@pytest.mark.parametrize("field", ["teacher_logp", "sampler_logp"])
def test_a_missing_score_makes_the_loss_nan(field: str, device: torch.device) -> None:
    """A missing score does not count as 0: the loss is NaN, and training stops before the step. Positions
    without a target have no effect."""
    it = learner(device)
    (batch,) = rollouts(it, torch.Generator().manual_seed(new_seed()), 1)
    assert math.isfinite(
        it.forward_backward([batch], on_policy(batch.counts, WEIGHTS), int(batch.counts[0])).loss
    )
    with_nan = getattr(batch, field).clone()
    with_nan[(batch.span > 0).nonzero()[0]] = math.nan
    broken = replace(batch, **{field: with_nan})
    assert math.isnan(
        it.forward_backward([broken], on_policy(batch.counts, WEIGHTS), int(batch.counts[0])).loss
    )


def test_measures_are_means_over_the_global_batch(device: torch.device) -> None:
    it = learner(device)
    batches = rollouts(it, torch.Generator().manual_seed(new_seed()), 4)
    counts = total_counts(batches)
    measures = it.forward_backward(batches, on_policy(counts, WEIGHTS), int(counts[0])).measures
    own, teacher, sampler, span = (
        torch.cat([values(batch) for batch in batches]).double()
        for values in (
            lambda b: logp(it, b),
            lambda b: b.teacher_logp,
            lambda b: b.sampler_logp,
            lambda b: b.span,
        )
    )
    for name, number in SPANS.items():
        gap, ratio = (own - teacher)[span == number], (own - sampler)[span == number].exp()
        assert measures.reverse_kl[name] == pytest.approx(gap.mean().item(), rel=1e-5, abs=1e-5)
        assert measures.sampler_kl[name] == pytest.approx((ratio - 1 - ratio.log()).mean().item(), rel=1e-5)
        assert measures.bounded.advantage[name] == pytest.approx(
            (gap.abs() > 20).double().mean().item(), abs=1e-9
        )
        assert measures.bounded.ratio[name] == pytest.approx((ratio > 2).double().mean().item(), abs=1e-9)
    assert 0 < measures.bounded.advantage["final"] < 1 and 0 < measures.bounded.ratio["final"] < 1


def test_measures_of_an_absent_span_are_null(device: torch.device) -> None:
    batch = one_row([-2.0], [-1.0])
    measures = learner(device).forward_backward([batch], on_policy(batch.counts, WEIGHTS), 2).measures
    assert (
        measures.reverse_kl["final"] is None
        and measures.bounded.ratio["final"] is None
        and measures.reverse_kl["reasoning"] < 0
    )


def test_a_batch_without_sampler_log_probabilities_is_rejected(device: torch.device) -> None:
    (batch,) = ragged_batches(torch.Generator().manual_seed(1), 1)
    scored = replace(batch, teacher_logp=torch.zeros(len(batch.span)))
    for each in (batch, scored):
        with pytest.raises(
            ValueError, match="needs a batch with the teacher's and the sampler's log-probabilities"
        ):
            learner(device).forward_backward([each], on_policy(batch.counts, WEIGHTS), int(batch.counts[0]))


def test_sampler_logp_is_at_the_position_that_predicts_the_token() -> None:
    batch = one_row([-1.0, -2.0], [-3.0, -4.0])
    assert batch.sampler_logp is not None and batch.teacher_logp is not None
    assert batch.sampler_logp.nan_to_num(9).tolist() == [-1, -2, 9] and batch.teacher_logp.nan_to_num(
        9
    ).tolist() == [-3, -4, 9]
