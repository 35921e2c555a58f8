"""Learning rates, the rhythm of checkpoints and evaluations, and the router's watch."""

import numpy as np
import pytest

from vpmoe.api.stages import Stop
from vpmoe.training import collapse
from vpmoe.training.schedule import due, learning_rate, no_longer_improves


@pytest.mark.parametrize(
    "seen, total, warmup, rate",
    [
        pytest.param(50, 1000, 100, 0.5, id="half-way-up"),
        pytest.param(100, 1000, 100, 1.0, id="peak"),
        pytest.param(550, 1000, 100, 0.55, id="half-way-down"),
        pytest.param(1000, 1000, 100, 0.1, id="the-end-is-the-lowest"),
        pytest.param(1000, 1000, 0, 0.1, id="no-warm-up"),
        pytest.param(1000, 1000, 1000, 1.0, id="warm-up-as-long-as-the-stage"),
        pytest.param(1000, 1000, 4000, 0.25, id="warm-up-longer-than-the-stage"),
    ],
)
def test_the_rate_rises_to_its_peak_and_falls_to_its_lowest_at_the_end(seen, total, warmup, rate):
    assert learning_rate(seen, total, warmup, peak=1.0, lowest=0.1) == pytest.approx(rate)


@pytest.mark.parametrize(
    "seen, every, steps",
    [
        pytest.param([10, 20, 30, 40], 20, [1, 3], id="multiples"),
        pytest.param([7, 14, 21, 28, 35], 20, [2, 4], id="first-step-past-it"),
        pytest.param([100, 200], 10, [0, 1], id="more-often-than-steps"),
        pytest.param([10, 20], 10**9, [1], id="longer-than-the-stage"),
    ],
)
def test_what_is_done_every_so_many_tokens_is_done_once_for_each_and_at_the_end(seen, every, steps):
    assert [step for step in range(len(seen)) if due(np.asarray(seen), step, every)] == steps


@pytest.mark.parametrize(
    "held_out, ends",
    [
        pytest.param([10.0, 5.0], False, id="too-few-evaluations"),
        pytest.param([10.0, 5.0, 4.99, 4.98], True, id="below-the-share"),
        pytest.param([10.0, 5.0, 4.99, 4.5], False, id="together-above-the-share"),
        pytest.param([5.0, 5.1, 5.2], True, id="getting-worse"),
    ],
)
def test_a_stage_ends_early_only_when_its_evaluations_together_bring_too_little(held_out, ends):
    assert no_longer_improves(held_out, Stop.model_validate({"evaluations": 2, "minImprovement": 0.01, "minValidity": 0.0})) is ends


def loads(dead: int | None = None, busy: int = 0) -> np.ndarray:
    load_LE = np.full((2, 64), 100)
    load_LE[1, 5] += busy
    if dead is not None:
        load_LE[1, dead] = 0
    return load_LE


@pytest.mark.parametrize(
    "load, reason, message",
    [
        pytest.param(loads(), None, "", id="even"),
        pytest.param(loads(busy=1000), None, "", id="within-the-bound"),
        pytest.param(loads(dead=3), "DeadExpert", "layer-2: 1 experts without a token, for up to 100 steps: 3", id="dead"),
        pytest.param(loads(busy=10**5), "Imbalance", "layer-2: the busiest expert has had more than 16 times the mean", id="uneven"),
    ],
)
def test_a_collapse_names_the_layer_after_patience_and_not_before(load, reason, message):
    watch = collapse.Watch(["layer-1", "layer-2"], 64)
    ratio_L = load.max(axis=1) / load.mean(axis=1)
    for _ in range(collapse.PATIENCE - 1):
        assert watch.step(load, ratio_L) == []
    found = watch.step(load, ratio_L)
    assert [finding.reason for finding in found] == ([reason] if reason else [])
    assert all(finding.layer == "layer-2" and finding.message.startswith(message) for finding in found)
    assert watch.step(loads(), np.ones(2)) == []
