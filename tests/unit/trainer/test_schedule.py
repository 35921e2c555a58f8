"""Learning rates, due checkpoints and evaluations, early ends, starvation, drift, and the router monitor."""

from itertools import pairwise

import numpy as np
import pytest

from vpmoe.api.stages import Stop
from vpmoe.checkpoint.train_state import WindowStream
from vpmoe.failure import Permanent
from vpmoe.objectives.onpolicy import BoundedShares, OnPolicyMeasures
from vpmoe.rollout.back_pressure import ADJUSTMENTS
from vpmoe.trainer.onpolicy import window_stats
from vpmoe.trainer.onpolicy.starvation import Starvation, next_adjustment, starvation_condition
from vpmoe.trainer.onpolicy.window_stats import ends_early, sampler_kl, windows_above_bound
from vpmoe.trainer.reporting import router_monitor
from vpmoe.trainer.schedule import due, learning_rate, no_longer_improves


@pytest.mark.parametrize(
    "seen, total, warmup, rate",
    [
        pytest.param(50, 1000, 100, 0.5, id="half-way-up"),
        pytest.param(100, 1000, 100, 1.0, id="peak"),
        pytest.param(550, 1000, 100, 0.55, id="half-way-down"),
        pytest.param(1000, 1000, 100, 0.1, id="end"),
        pytest.param(1000, 1000, 0, 0.1, id="no-warm-up"),
        pytest.param(1000, 1000, 1000, 1.0, id="warm-up-as-long-as-the-stage"),
        pytest.param(1000, 1000, 4000, 0.25, id="warm-up-longer-than-the-stage"),
    ],
)
def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_lowest_at_the_end(seen, total, warmup, rate):
    assert learning_rate(seen, total, warmup, peak=1.0, lowest=0.1) == pytest.approx(rate)


@pytest.mark.parametrize(
    "seen, every, steps",
    [
        pytest.param([10, 20, 30, 40], 20, [1, 3], id="multiples"),
        pytest.param([7, 14, 21, 28, 35], 20, [2], id="first-step-past-it"),
        pytest.param([100, 200], 10, [0, 1], id="more-often-than-steps"),
        pytest.param([10, 20], 10**9, [], id="longer-than-the-stage"),
    ],
)
def test_what_is_due_every_n_tokens_is_due_at_the_first_step_that_reaches_them(seen, every, steps):
    assert [
        step for step, (before, after) in enumerate(pairwise([0, *seen])) if due(before, after, every)
    ] == steps


@pytest.mark.parametrize(
    "held_out, ends",
    [
        pytest.param([10.0, 5.0], False, id="too-few-evaluations"),
        pytest.param([10.0, 5.0, 4.99, 4.98], True, id="below-the-share"),
        pytest.param([10.0, 5.0, 4.99, 4.5], False, id="together-above-the-share"),
        pytest.param([5.0, 5.1, 5.2], True, id="getting-worse"),
    ],
)
def test_a_stage_ends_early_if_its_last_evaluations_together_improve_too_little(held_out, ends):
    assert (
        no_longer_improves(
            held_out, Stop.model_validate({"evaluations": 2, "minImprovement": 0.01, "minValidity": 0.0})
        )
        is ends
    )


@pytest.mark.parametrize(
    "reverse_kl, validity, ends",
    [
        pytest.param((5.0, 4.99, 4.99), 0.96, True, id="no-longer-falls-and-valid"),
        pytest.param((5.0, 4.99, 4.99), 0.94, False, id="not-valid-enough"),
        pytest.param((5.0, 4.0, 3.0), 1.0, False, id="still-falls"),
        pytest.param((5.0, 4.99), 1.0, False, id="too-few-evaluations"),
    ],
)
def test_an_on_policy_stage_ends_early_by_reverse_kl_and_validity(reverse_kl, validity, ends):
    stop = Stop.model_validate({"evaluations": 2, "minImprovement": 0.01, "minValidity": 0.95})
    windows = WindowStream(first_prompt=0, next_prompt=8, trained=2, reverse_kl=reverse_kl, validity=validity)
    assert ends_early(windows, stop) is ends


@pytest.mark.parametrize(
    "steps, share",
    [
        pytest.param([(1, 4), (3, 4)], 0.5, id="windows-alone"),
        pytest.param([(9, 9), (1, 4), (3, 4)], 0.5, id="the-last-ones"),
        pytest.param([(1, 3), (None, 1), (3, 4)], 0.5, id="anchor-steps-count-as-time"),
        pytest.param([(None, 7), (1, 4), (3, 4), (None, 8)], 0.25, id="anchor-steps-at-the-ends"),
        pytest.param([(4, 4)], None, id="too-few-windows"),
    ],
)
def test_starvation_is_the_share_of_waiting_in_the_last_windows(steps, share):
    starvation = Starvation(2)
    for waited, seconds in steps:
        starvation.add_anchor(seconds) if waited is None else starvation.add_window(waited, seconds)
    assert starvation.share == share
    starvation.reset()
    assert starvation.share is None


def test_adjustments_are_made_in_order_and_end_with_the_last():
    adjustments = []
    for window in range(8):
        assert (
            next_adjustment(adjustments, 0.5, 0.5, window) is None
            and next_adjustment(adjustments, None, 0.5, window) is None
        )
        if adjustment := next_adjustment(adjustments, 0.51, 0.5, window):
            adjustments.append(adjustment)
    assert [(adjustment.number, adjustment.window, adjustment.setting) for adjustment in adjustments] == [
        (n + 1, n, setting) for n, setting in enumerate(ADJUSTMENTS)
    ]
    reasons = [starvation_condition(adjustment).reason for adjustment in adjustments]
    assert reasons == ["MaxTokensLowered"] * 2 + ["HighEffortLowered"] * 2 + ["SecondTeacherAdvised"]


def measures(reasoning, final):
    kl, none = {"reasoning": reasoning, "final": final}, {"reasoning": None, "final": None}
    return OnPolicyMeasures(reverse_kl=none, sampler_kl=kl, bounded=BoundedShares(advantage=none, ratio=none))


def test_drift_is_a_number_of_consecutive_windows():
    count = 0
    for _ in range(window_stats.PATIENCE - 1):
        count = windows_above_bound(count, 0.2, 0.1, 7)
    assert count == window_stats.PATIENCE - 1 and windows_above_bound(count, 0.1, 0.1, 7) == 0
    with pytest.raises(
        Permanent,
        match=r"SamplerDrift: .* maxSamplerKl 0.1 for 10 windows in a row, 0.2 nats a token in window 7",
    ):
        windows_above_bound(count, 0.2, 0.1, 7)
    assert sampler_kl(measures(0.4, None), {"reasoning": 30, "final": 0}) == 0.4
    assert sampler_kl(measures(0.4, 0.1), {"reasoning": 10, "final": 20}) == pytest.approx(0.2)


def expert_loads(dead: int | None = None, busy: int = 0) -> np.ndarray:
    load_LE = np.full((2, 64), 100)
    load_LE[1, 5] += busy
    if dead is not None:
        load_LE[1, dead] = 0
    return load_LE


@pytest.mark.parametrize(
    "load, reason, message",
    [
        pytest.param(expert_loads(), None, "", id="even"),
        pytest.param(expert_loads(busy=1000), None, "", id="within-the-bound"),
        pytest.param(
            expert_loads(dead=3),
            "DeadExpert",
            "layer-2: 1 experts without a token, for up to 100 steps: 3",
            id="dead",
        ),
        pytest.param(
            expert_loads(busy=10**5),
            "Imbalance",
            "layer-2: the busiest expert had more than 16 times the mean",
            id="uneven",
        ),
    ],
)
def test_a_collapse_names_the_layer_after_patience_and_not_before(load, reason, message):
    monitor = router_monitor.RouterMonitor(["layer-1", "layer-2"], 64)
    ratio_L = load.max(axis=1) / load.mean(axis=1)
    for _ in range(router_monitor.PATIENCE - 1):
        assert monitor.add_step(load, ratio_L) == []
    found = monitor.add_step(load, ratio_L)
    assert [finding.reason for finding in found] == ([reason] if reason else [])
    assert all(finding.layer == "layer-2" and finding.message.startswith(message) for finding in found)
    assert monitor.add_step(expert_loads(), np.ones(2)) == []
