"""Targets, spans and denominators: which tokens are learned, at which position, and with which weight."""

import pytest
import torch

from tests.fakes.students import SMALL, learner, new_seed, ragged_batches
from vpmoe.data.spans import SPANS
from vpmoe.model import spans
from vpmoe.model.batch import Batch
from vpmoe.model.head import head_loss
from vpmoe.model.student import build
from vpmoe.objectives.vanilla import vanilla

EVEN = {"reasoning": 1.0, "final": 1.0}


@pytest.mark.parametrize(
    "documents, span_of_tokens, target, span",
    [
        pytest.param(
            [0, 0, 0, 0],
            [0, 0, 1, 2],
            [-1, 12, 13, -1],
            [0, 1, 2, 0],
            id="one-document-predicts-the-next-token",
        ),
        pytest.param([0, 0, 1, 1], [0, 1, 1, 1], [11, -1, 13, -1], [1, 0, 1, 0], id="never-across-documents"),
        pytest.param([0, 0, -1, -1], [0, 2, 0, 0], [11, -1, -1, -1], [2, 0, 0, 0], id="never-padding"),
        pytest.param(
            [0, 0, 0, -1], [1, 0, 2, 2], [-1, 12, -1, -1], [0, 2, 0, 0], id="the-target's-span-decides"
        ),
        pytest.param([-1, -1, -1, -1], [1, 1, 1, 1], [-1] * 4, [0] * 4, id="all-padding"),
        pytest.param([0, 1, 2, 3], [1, 2, 1, 2], [-1] * 4, [0] * 4, id="documents-of-one-token"),
    ],
)
def test_targets_and_their_spans(
    documents: list[int], span_of_tokens: list[int], target: list[int], span: list[int]
) -> None:
    tokens = torch.tensor([[10, 11, 12, 13]])
    got = spans.targets(
        tokens,
        torch.tensor([span_of_tokens], dtype=torch.uint8),
        torch.tensor([documents], dtype=torch.int32),
    )
    assert got[0].tolist() == target and got[1].tolist() == span


def test_targets_do_not_cross_rows() -> None:
    target, _ = spans.targets(
        torch.tensor([[1, 2], [3, 4]]),
        torch.ones(2, 2, dtype=torch.uint8),
        torch.zeros(2, 2, dtype=torch.int32),
    )
    assert target.tolist() == [2, -1, 4, -1]


def test_coefficients_divide_by_the_counts_of_the_global_batch() -> None:
    tokens, span, documents = (
        torch.arange(6).unsqueeze(0),
        torch.tensor([[0, 1, 1, 1, 2, 0]], dtype=torch.uint8),
        torch.zeros(1, 6).int(),
    )
    batch = Batch.from_rows(tokens, span, documents)
    assert batch.counts.tolist() == [6, 3, 1]
    coefficient = vanilla(torch.tensor([60, 30, 5]), {"reasoning": 1.0, "final": 2.0}).coefficient_of(batch)
    assert coefficient(torch.zeros(6), torch.arange(6)).tolist() == pytest.approx(
        [1 / 30, 1 / 30, 1 / 30, 2 / 5, 0, 0]
    )


def test_values_of_spans_are_those_of_a_table() -> None:
    span_T = torch.tensor([0, 2, 1, 1, 0, 2], dtype=torch.uint8)
    found = spans.values_of_spans([0.5, 1 / 3, -7e30], span_T)
    assert found.equal(torch.tensor([0.5, 1 / 3, -7e30])[span_T.long()])


def test_an_absent_span_contributes_nothing() -> None:
    tokens, span, documents = (
        torch.arange(4).unsqueeze(0),
        torch.tensor([[0, 1, 1, 1]], dtype=torch.uint8),
        torch.zeros(1, 4).int(),
    )
    batch = Batch.from_rows(tokens, span, documents)
    c_T = vanilla(batch.counts, EVEN).coefficient_of(batch)(torch.zeros(4), torch.arange(4))
    assert c_T.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


@pytest.mark.parametrize(
    "weights",
    [{"reasoning": 1.0}, {"reasoning": 1.0, "final": 1.0, "prompt": 1.0}],
    ids=["missing", "unknown"],
)
def test_weights_for_other_spans_are_rejected(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"training\.spanWeights"):
        vanilla(torch.tensor([1, 1, 1]), weights)


def test_prompt_tokens_contribute_no_gradient(device: torch.device) -> None:
    """A prompt token adds no gradient to the hidden state that predicts it, nor to its own row of the output
    matrix."""
    student = build(SMALL, device, sequence_length=30, seed=1234)
    tokens = torch.arange(30).unsqueeze(
        0
    )  # every token once, so that a row of the matrix belongs to one position
    span = torch.zeros(1, 30, dtype=torch.uint8)
    span[0, 10:20], span[0, 20:25] = 1, 2
    batch = Batch.from_rows(tokens, span, torch.zeros(1, 30, dtype=torch.int32))
    hidden = student(batch).detach().requires_grad_()
    loss, _ = head_loss(
        hidden, student.output, batch.target, vanilla(batch.counts, EVEN).coefficient_of(batch)
    )
    loss.backward()
    learned = torch.zeros(30, dtype=torch.bool)
    learned[9:24] = True
    assert (hidden.grad[~learned] == 0).all() and (hidden.grad[learned] != 0).any(1).all()
    # The row of a token that occurs only in the prompt gets a gradient only from the softmax at learned
    # positions.
    exact = hidden.detach().double()
    c_T = vanilla(batch.counts, EVEN).coefficient_of(batch)(torch.zeros(30), torch.arange(30)).double()
    pushed = ((exact @ student.output.detach().double().T).softmax(1) * c_T.unsqueeze(1)).T @ exact
    torch.testing.assert_close(student.output.grad[:10].double(), pushed[:10], rtol=1e-5, atol=1e-8)


def test_span_normalisation_over_ragged_microbatches_equals_float64(device: torch.device) -> None:
    """Loss, cross-entropies and the output matrix's gradient of several uneven microbatches equal those of
    one float64 mean per span over all of them."""
    generator = torch.Generator().manual_seed(new_seed())
    it = learner(device)
    batches = ragged_batches(generator, 5)
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    weights = {"reasoning": 0.7, "final": 1.6}
    nll = []
    output = it.student.output.detach().double().requires_grad_()
    for batch in batches:
        with torch.no_grad():
            hidden = it.student(batch).double()
        nll.append(
            -torch.log_softmax(hidden @ output.T, 1)
            .gather(1, batch.target.clamp(min=0).unsqueeze(1))
            .squeeze(1)
        )
    all_nll, all_span = torch.cat(nll), torch.cat([batch.span for batch in batches])
    exact = {name: all_nll[all_span == number].mean() for name, number in SPANS.items()}
    sum(weights[name] * mean for name, mean in exact.items()).backward()
    means = {name: float(mean) for name, mean in exact.items()}
    outcome = it.forward_backward(batches, vanilla(counts, weights), int(counts[0]))
    assert outcome.cross_entropy == pytest.approx(means, rel=1e-6)
    assert outcome.loss == pytest.approx(sum(weights[name] * mean for name, mean in means.items()), rel=1e-6)
    assert outcome.tokens == {"reasoning": int((all_span == 1).sum()), "final": int((all_span == 2).sum())}
    gradient = it.student.output.main_grad.double() / int(counts[0])  # type: ignore[attr-defined]
    torch.testing.assert_close(gradient, output.grad, rtol=1e-4, atol=1e-8)
    assert it.evaluate(batches).cross_entropy == pytest.approx(means, rel=1e-6)


def test_the_division_into_microbatches_does_not_change_the_gradient(device: torch.device) -> None:
    """Two rows as one microbatch or as two: equal up to rounding. A mean of means would differ clearly,
    because the rows are uneven."""
    generator = torch.Generator().manual_seed(new_seed())
    row = torch.randint(0, SMALL.vocabulary, (2, 40), generator=generator)
    span = torch.zeros(2, 40, dtype=torch.uint8)
    span[0, 5:], span[1, 38:] = 1, 1
    documents = torch.zeros(2, 40, dtype=torch.int32)
    documents[1, 39:] = -1
    gradients = []
    for cuts in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        it = learner(device)
        batches = [Batch.from_rows(row[cut], span[cut], documents[cut]) for cut in cuts]
        counts = torch.stack([batch.counts for batch in batches]).sum(0)
        it.forward_backward(batches, vanilla(counts, EVEN), int(counts[0]))
        gradients.append(torch.cat([p.main_grad.flatten() / int(counts[0]) for p in it.student.parameters()]))
    assert gradients[0].norm() > 0.01
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)
