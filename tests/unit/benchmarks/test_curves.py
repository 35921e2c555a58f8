"""benchmarks.curves: its band and its other rules on numbers, and a few steps of a small student, right and
with faults of training that it must find."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import curves
from benchmarks.curves import Case, Curve, Document, Training
from vpmoe.model import state
from vpmoe.model.learner import Learner
from vpmoe.model.router import ExpertLoad

CASE = Case("tiny", layers=2, vocabulary=256, tokens=512, rate=3e-3)
STEPS = 4
REFERENCES = [[2.0] * 30, [2.1] * 30, [1.9] * 30]


@pytest.mark.parametrize(
    "found, inside",
    [
        pytest.param([2.0] * 30, True, id="the same"),
        pytest.param([2.19] * 30, True, id="within the spread of 0.2"),
        pytest.param([2.21] * 30, False, id="above"),
        pytest.param([1.79] * 30, False, id="below"),
        pytest.param([2.0] * 29 + [3.9], True, id="one step that the mean of ten forgives"),
        pytest.param([2.0] * 20 + [2.3] * 10, False, id="the last ten steps"),
        pytest.param([2.0] * 29 + [math.nan], False, id="not a number"),
    ],
)
def test_a_curve_is_inside_the_band_of_the_seeds(found: Sequence[float], inside: bool) -> None:
    assert curves.compare(found, REFERENCES).inside == inside


def test_where_seeds_meet_the_band_is_a_share_of_the_value() -> None:
    same = [[2.0] * 10, [2.0] * 10]
    assert curves.compare([2.0 * (1 + 0.9 * curves.FLOOR)] * 10, same).inside
    assert not curves.compare([2.0 * (1 + 1.1 * curves.FLOOR)] * 10, same).inside


@pytest.mark.parametrize("references", [REFERENCES[:1], [[2.0] * 30, [2.0] * 29]], ids=["one", "uneven"])
def test_a_band_needs_references_of_as_many_steps(references: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="two or more of as many steps"):
        curves.compare([2.0] * 30, references)


@pytest.mark.parametrize(
    "distance, right",
    [(1.0, True), (2.9, True), (0.7, True), (0.0, False), (0.6, False), (3.1, False), (math.nan, False)],
)
def test_a_parameter_moves_as_far_as_in_the_references(distance: float, right: bool) -> None:
    wrong = curves.moved_wrongly({"a": distance, "b": 1.0}, [{"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 1.0}])
    assert list(wrong) == ([] if right else ["a"])


def test_rare_ids_become_the_last_one() -> None:
    one = Document(np.asarray([900, 7, 900, 5, 7, 900, 3], np.int32), np.zeros(7, np.uint8))
    (found,) = curves.reduced([one], 3)
    assert found.tokens.tolist() == [0, 1, 0, 2, 1, 0, 2]


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return curves.documents_of(None, CASE.tokens)


@pytest.fixture(scope="module")
def references(documents: list[Document], device: torch.device) -> list[Curve]:
    return curves.make_reference(CASE, documents, device, seeds=2, steps=STEPS)


def wrong_with(documents: list[Document], references: list[Curve], device: torch.device) -> str:
    """What is wrong, a line each. So few steps do not balance the load, which is left out."""
    found = curves.check_device(CASE, documents, device, 1, STEPS, STEPS, references)
    return "\n".join(line for line in found if "busiest" not in line)


def test_the_sample_makes_documents_of_three_spans(documents: list[Document]) -> None:
    assert len(documents) > 40
    for one in documents:
        assert len(one.tokens) == len(one.spans) <= CASE.tokens
        assert (one.spans == 0).any() and (one.spans == 2).any()


def test_weights_are_those_that_the_cpu_draws(device: torch.device) -> None:
    drawn, given = (curves.new_learner(CASE, device, seed) for seed in (1, 2))
    curves.set_weights(given, 1)
    assert not curves.different(curves.copy_of(drawn), curves.copy_of(given))


def test_the_reference_itself_is_right(
    documents: list[Document], references: list[Curve], device: torch.device
) -> None:
    assert not wrong_with(documents, references, device)


def scaled_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Learner.step

    def step(learner: Learner, rate: float) -> float:
        assert learner._positions is not None
        learner._positions = learner._positions / 1.05  # which divide them
        return whole(learner, rate)

    monkeypatch.setattr(Learner, "step", step)


def frozen_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Learner.step

    def step(learner: Learner, rate: float) -> float:
        stack = learner.student.decoder.layers[1].mlp.experts.up.detach()  # on the CPU the main parameter too
        before = stack[3].clone()
        norm = whole(learner, rate)
        stack[3] = before
        return norm

    monkeypatch.setattr(Learner, "step", step)


@pytest.mark.parametrize(
    "fault, message",
    [
        pytest.param(scaled_gradients, "the first step's norm", id="gradients 5 % too large"),
        pytest.param(frozen_expert, "experts.up[3] moved", id="an expert without an update"),
    ],
)
def test_a_fault_of_training_is_found(
    fault: Callable[[pytest.MonkeyPatch], None],
    message: str,
    documents: list[Document],
    references: list[Curve],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    found = wrong_with(documents, references, device)
    assert message in found and "resumed" not in found


def test_a_resumed_run_without_moments_is_found(
    documents: list[Document],
    references: list[Curve],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(state, "restore", partial(state.restore, moments=False))
    assert "resumed: " in wrong_with(documents, references, device)


def test_a_dead_expert_and_an_uneven_load_are_found(device: torch.device) -> None:
    learner = curves.new_learner(CASE, device, 1)
    training = Training(learner, lambda step: None, CASE.rate)  # type: ignore[arg-type, return-value]
    tokens = torch.tensor([[64, 0, 16, 16, 8, 8, 8, 8]])
    training.loads = [ExpertLoad(("layers.1",), tokens, torch.ones(1))] * 2
    found = "\n".join(curves.print_balance(training, training.bias_range()))
    assert "1 experts without a token" in found and "4.00 times the mean" in found
