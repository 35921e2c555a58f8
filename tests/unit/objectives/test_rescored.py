"""Confidence weights equal those in float64, and the centre makes their mean 1."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.fakes.students import learner, new_seed, ragged_batches
from vpmoe.api.stages import Confidence
from vpmoe.data.spans import SPANS
from vpmoe.model.batch import Batch
from vpmoe.objectives.confidence import centre, weights
from vpmoe.objectives.rescored import rescored
from vpmoe.objectives.vanilla import vanilla

WEIGHTS = {"reasoning": 0.7, "final": 1.6}
CENTRE = {"reasoning": -1.25, "final": -0.5}
DEFAULT = Confidence()


def histogram(values: np.ndarray) -> list[list[int]]:
    bits, counts = np.unique(values.astype(np.float16).view(np.uint16), return_counts=True)
    return [[int(b), int(c)] for b, c in zip(bits, counts, strict=True)]


def scored_batches(generator: torch.Generator, microbatches: int) -> list[Batch]:
    """Ragged microbatches whose targets have a teacher's log p from −12 to 0."""
    return [
        replace(
            batch,
            teacher_logp=torch.where(
                batch.span > 0, -12 * torch.rand(len(batch.span), generator=generator) ** 3, torch.nan
            ),
        )
        for batch in ragged_batches(generator, microbatches)
    ]


@pytest.mark.parametrize(
    "confidence",
    [
        pytest.param({}, id="default"),
        pytest.param({"temperature": 0.1}, id="sharp"),
        pytest.param({"temperature": 50.0}, id="flat"),
        pytest.param({"min": 0.9, "max": 1.1}, id="narrow"),
        pytest.param({"min": 1e-3, "max": 1000.0, "temperature": 3.0}, id="wide"),
        pytest.param({"min": 1.0, "max": 4.0}, id="no-weight-below-one"),
        pytest.param({"min": 0.25, "max": 1.0}, id="no-weight-above-one"),
        pytest.param({"min": 1.0, "max": 1.0}, id="all-one"),
    ],
)
@pytest.mark.parametrize("shape", [0.3, 2.0, 8.0])
def test_the_mean_weight_over_all_scored_tokens_is_one(confidence: dict[str, float], shape: float) -> None:
    """In float64 over the stored float16 values. 1e-9 is far above the rounding of this sum."""
    random = np.random.default_rng(new_seed())
    values = np.maximum(-random.exponential(shape, 50_000), -100).astype(np.float16)
    chosen = Confidence(**confidence)
    m = centre(histogram(values), chosen)
    assert weights(values.astype(np.float64), m, chosen).mean() == pytest.approx(1, abs=1e-9)


def test_weights_are_clipped_at_both_ends() -> None:
    values = np.concatenate([np.full(2400, -12.0), np.full(1, -6.0), np.full(600, -0.001)])
    found = weights(values, centre(histogram(values), DEFAULT), DEFAULT)
    assert (
        (found == DEFAULT.min).sum() == 2400
        and (found == DEFAULT.max).sum() == 600
        and found[2400] == pytest.approx(1)
    )


def test_the_centre_of_no_value_and_of_one() -> None:
    assert centre([], DEFAULT) == 0.0
    assert centre(histogram(np.array([-2.5])), DEFAULT) == pytest.approx(-2.5, abs=1e-12)


def reference_loss(batches: list[Batch], logits: list[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
    """The loss in float64, term by term (design §6)."""
    loss = torch.zeros((), dtype=torch.float64)
    for batch, logits_TV in zip(batches, logits, strict=True):
        assert batch.teacher_logp is not None
        for t in (batch.span > 0).nonzero().squeeze(1).tolist():
            span = int(batch.span[t])
            name = {number: name for name, number in SPANS.items()}[span]
            weight = min(max(math.exp((float(batch.teacher_logp[t]) - CENTRE[name]) / 1.7), 0.25), 4.0)
            loss = (
                loss
                - WEIGHTS[name] / int(counts[span]) * weight * logits_TV[t].log_softmax(0)[batch.target[t]]
            )
    return loss


def test_loss_and_gradients_over_ragged_microbatches_equal_float64(device: torch.device) -> None:
    """Relative tolerance 2e-5: fp32 sums over some hundred tokens."""
    batches = scored_batches(torch.Generator().manual_seed(new_seed()), 3)
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    it = learner(device)
    objective = rescored(counts, WEIGHTS, Confidence(temperature=1.7), CENTRE)
    outcome = it.forward_backward(batches, objective, int(counts[0]))
    gradient = it.student.output.main_grad.clone() / int(counts[0])  # type: ignore[attr-defined]
    with torch.no_grad():
        hidden = [it.student(batch).double() for batch in batches]
    output = it.student.output.detach().double().requires_grad_()
    loss = reference_loss(batches, [h @ output.T for h in hidden], counts)
    loss.backward()
    assert outcome.loss == pytest.approx(loss.item(), rel=2e-5)
    assert output.grad is not None
    torch.testing.assert_close(gradient.double(), output.grad, rtol=2e-4, atol=1e-7)


def test_measures_are_means_over_the_global_batch(device: torch.device) -> None:
    batches = scored_batches(torch.Generator().manual_seed(new_seed()), 4)
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    measures = (
        learner(device)
        .forward_backward(batches, rescored(counts, WEIGHTS, DEFAULT, CENTRE), int(counts[0]))
        .measures
    )
    for name, span in SPANS.items():
        logp = torch.cat([batch.teacher_logp[batch.span == span] for batch in batches]).double()  # type: ignore[index]
        weight = (logp - CENTRE[name]).exp().clamp(0.25, 4.0)
        assert measures.teacher_logp[name] == pytest.approx(logp.mean().item(), rel=1e-6)
        assert measures.weight.mean[name] == pytest.approx(weight.mean().item(), rel=1e-6)
        assert measures.weight.saturation_low[name] == pytest.approx(
            (weight <= 0.25).double().mean().item(), abs=1e-9
        )
        assert measures.weight.saturation_high[name] == pytest.approx(
            (weight >= 4).double().mean().item(), abs=1e-9
        )


def test_weights_of_one_give_the_loss_of_vanilla(device: torch.device) -> None:
    batches = scored_batches(torch.Generator().manual_seed(new_seed()), 2)
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    flat = rescored(counts, WEIGHTS, Confidence(min=1.0, max=1.0), CENTRE)
    outcomes = [
        learner(device).forward_backward(batches, it, int(counts[0])).loss
        for it in (flat, vanilla(counts, WEIGHTS))
    ]
    assert outcomes[0] == outcomes[1]


def test_scores_are_at_the_position_that_predicts_the_token() -> None:
    tokens = torch.arange(8).view(1, 8)
    spans = torch.tensor([[0, 1, 1, 2, 0, 2, 2, 0]], dtype=torch.uint8)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1]], dtype=torch.int32)
    batch = Batch.from_rows(tokens, spans, documents, -tokens.float())
    assert batch.target.tolist() == [1, 2, 3, -1, 5, 6, -1, -1]
    assert batch.teacher_logp is not None
    assert torch.equal(batch.teacher_logp.nan_to_num(99), torch.tensor([-1.0, -2, -3, 99, -5, -6, 99, 99]))


def test_a_batch_without_scores_is_rejected(device: torch.device) -> None:
    batches = ragged_batches(torch.Generator().manual_seed(1), 1)
    with pytest.raises(ValueError, match="needs a batch with the teacher's log-probabilities"):
        learner(device).forward_backward(
            batches, rescored(batches[0].counts, WEIGHTS, DEFAULT, CENTRE), int(batches[0].counts[0])
        )


def test_missing_scores_give_a_coefficient_of_zero() -> None:
    """A position without a score has no target, and its coefficient is 0 and not NaN."""
    batch = scored_batches(torch.Generator().manual_seed(2), 1)[0]
    c_T = rescored(batch.counts, WEIGHTS, DEFAULT, CENTRE).coefficient_of(batch)(
        torch.zeros_like(batch.span), torch.arange(len(batch.span))
    )
    assert c_T[batch.span == 0].eq(0).all() and c_T[batch.span > 0].gt(0).all()
