"""The schedule of windows: every role computes the same one."""

import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.curricula import PARTS, SHARES, TOKENS_PER_STEP, plan_window, stage, windows
from tests.fakes.students import new_seed
from vpmoe.api.stages import MaxTokens
from vpmoe.data.packing import epoch_order
from vpmoe.rollout.back_pressure import ADJUSTMENTS, Adjustment
from vpmoe.rollout.curriculum import EFFORTS, Curriculum, Level
from vpmoe.rollout.windows import (
    WindowSchedule,
    completion_limit,
    draw_effort,
    request_seed,
    rollouts_per_prompt,
)

SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.permutations(range(30)), SHARES)
def test_a_schedule_does_not_depend_on_the_order_of_queries(
    seed: int, order: list[int], anchor: float
) -> None:
    anchor = min(anchor, 0.8)
    one, other = windows(seed, anchor=anchor), windows(seed, anchor=anchor)
    plans = {number: plan_window(one, number) for number in order}
    assert all(plan_window(other, number) == plans[number] for number in range(30))


def test_another_process_computes_the_same_windows() -> None:
    code = """
        import dataclasses, json
        from tests.fakes.curricula import plan_window, windows
        found = [plan_window(windows(), number) for number in (0, 7, 100)]
        print(json.dumps([dataclasses.asdict(window) | {"max_tokens": 0} for window in found]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    output = subprocess.run(
        command,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    for found, number in zip(json.loads(output), (0, 7, 100), strict=True):
        plan = plan_window(windows(), number)
        assert (found["number"], found["version"], found["phase"]) == (plan.number, plan.version, plan.phase)
        assert [(p["place"], p["document"], p["effort"], tuple(p["seeds"])) for p in found["prompts"]] == [
            (p.place, p.document, p.effort, p.seeds) for p in plan.prompts
        ]


def test_windows_have_not_changed() -> None:
    """A run that is resumed with another version of the code must get the same windows. A change must be
    announced to users."""
    prompts = plan_window(windows(), 140).prompts
    found = [(p.document, p.effort, len(p.seeds)) for p in prompts]
    assert found == [
        (16, "medium", 1),
        (5, "medium", 1),
        (9, "medium", 2),
        (12, "medium", 1),
    ]
    assert prompts[2].seeds[1] == request_seed(1234, 140, 2, 1) == 7657717004566806949


@given(SEEDS, st.integers(1, 60), st.integers(0, 70))
def test_each_prompt_is_sampled_once_per_epoch_in_epoch_order(seed: int, prompts: int, first: int) -> None:
    it = windows(seed, prompts, first)
    documents = np.concatenate([it.documents(number) for number in range(-(-100 // prompts))])
    stream = np.concatenate([epoch_order(PARTS, seed, epoch) for epoch in range(10)])
    assert documents.tolist() == stream[first : first + len(documents)].tolist()
    for epoch in range(1, 3):
        one_epoch = documents[25 * epoch - first % 25 :][:25]
        assert sorted(one_epoch) == list(range(25))


@given(SEEDS)
def test_no_two_rollouts_share_a_seed(seed: int) -> None:
    it = windows(seed)
    seeds = [s for number in range(40) for prompt in plan_window(it, number).prompts for s in prompt.seeds]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)


@given(st.fractions(1, 64, max_denominator=997), st.integers(1, 600))
def test_the_rollouts_of_a_window_have_the_mean_and_are_evenly_spread(mean: Fraction, prompts: int) -> None:
    found = rollouts_per_prompt(Level(0, (Fraction(1), Fraction(0), Fraction(0)), mean), prompts)
    assert len(found) == prompts and sum(found) == int(prompts * mean)
    assert set(found) <= {int(mean), -int(-mean // 1)}
    assert all(abs(sum(found[:n]) - n * mean) < 1 for n in range(prompts)), (
        "every prefix has the mean, up to rounding"
    )


def test_rollouts_increase_gradually_over_the_last_quarter() -> None:
    it = windows(prompts=20, anchor=0, staleness=0, publishEvery=1)
    counts = [
        sum(len(prompt.seeds) for prompt in plan_window(it, number).prompts) for number in range(75, 176)
    ]
    assert counts[0] == counts[75] == 20 and counts[-2] == 39 and counts[-1] == 80
    assert counts[:-1] == sorted(counts[:-1]) and len(set(counts)) > 15


@pytest.mark.parametrize("shares", [(0.7, 0.3, 0.0), (0.2, 0.6, 0.2), (0.1, 0.3, 0.6), (0.0, 0.0, 1.0)])
def test_efforts_are_drawn_with_their_shares(shares: tuple[float, ...]) -> None:
    """Within six standard deviations of independent draws. A share of 0 is never drawn."""
    seed, windows_, prompts = new_seed(), 40, 500
    level = Level(0, tuple(Fraction(str(share)) for share in shares), Fraction(1))
    drawn = Counter(
        draw_effort(level, seed, window, prompt) for window in range(windows_) for prompt in range(prompts)
    )
    for name, share in zip(EFFORTS, shares, strict=True):
        assert (
            abs(drawn[name] / (windows_ * prompts) - share)
            <= 6 * (share * (1 - share) / (windows_ * prompts)) ** 0.5
        )


def test_an_effort_does_not_depend_on_the_other_prompts() -> None:
    few, many = plan_window(windows(prompts=4), 3), plan_window(windows(prompts=12), 3)
    assert [p.effort for p in few.prompts] == [p.effort for p in many.prompts[:4]]
    assert [p.seeds for p in few.prompts] == [p.seeds for p in many.prompts[:4]]


def test_a_window_has_the_version_and_phase_of_the_curriculum() -> None:
    it = windows(staleness=2, publishEvery=2, anchor=0.5)
    for number in (0, 5, 60, 90):
        found = plan_window(it, number)
        assert found.version == it.curriculum.version_of(number)
        assert (
            found.phase
            == Curriculum(it.curriculum.stage)
            .level_at(TOKENS_PER_STEP * it.curriculum.steps_trained(found.version))
            .phase
        )
    assert {plan_window(it, number).phase for number in (0, 60, 120)} == {0, 1, 2}


def test_adjustments_apply_from_their_window_and_change_nothing_else() -> None:
    it = windows(prompts=400, curriculum=[{"share": 1, "effort": {"low": 0.2, "medium": 0.2, "high": 0.6}}])
    adjustments = [
        Adjustment(number=number, window=10 * number, setting=setting, waiting=0.6)
        for number, setting in enumerate(ADJUSTMENTS, 1)
    ]
    bounds, shares = [], []
    for number in (9, 10, 20, 30, 40, 50):
        plain, found = plan_window(it, number), plan_window(it, number, adjustments)
        assert found.adjustments == number // 10 and (found.version, found.phase) == (
            plain.version,
            plain.phase,
        )
        assert [(p.document, p.seeds) for p in found.prompts] == [
            (p.document, p.seeds) for p in plain.prompts
        ]
        bounds.append(tuple(getattr(found.max_tokens, name) for name in EFFORTS))
        shares.append([Counter(p.effort for p in window.prompts)["high"] / 400 for window in (plain, found)])
        assert (
            Counter(p.effort for p in found.prompts)["low"] == Counter(p.effort for p in plain.prompts)["low"]
        )
    assert bounds == [(1024, 2048, 4096), (768, 1536, 3072), *[(576, 1152, 2304)] * 4]
    for (plain_high, high), factor in zip(shares, (1, 1, 1, 0.5, 0.25, 0.25), strict=True):
        assert plain_high == pytest.approx(0.6, abs=6 * (0.24 / 400) ** 0.5)
        assert high == pytest.approx(0.6 * factor, abs=6 * (0.24 / 400) ** 0.5)


def test_adjusted_limits_are_at_least_one_token() -> None:
    it = windows(rollout={"promptsPerWindow": 1, "maxTokens": {"low": 1, "medium": 2, "high": 3}})
    adjustments = [Adjustment(number=number, window=0, setting="maxTokens", waiting=0.6) for number in (1, 2)]
    assert plan_window(it, 0, adjustments).max_tokens == MaxTokens(low=1, medium=1, high=1)


@pytest.mark.parametrize(
    "prompt, effort, sequence, bound",
    [
        (100, "low", 8192, 1024),
        (100, "high", 8192, 4096),
        (7000, "medium", 8192, 1192),
        (8191, "low", 8192, 1),
    ],
    ids=["low", "high", "the-sequence-ends-first", "one-token"],
)
def test_a_completion_is_limited_by_its_effort_and_the_sequence(
    prompt: int, effort: str, sequence: int, bound: int
) -> None:
    assert completion_limit(prompt, effort, MaxTokens(), sequence) == bound


def test_a_prompt_that_fills_the_sequence_is_rejected() -> None:
    with pytest.raises(
        ValueError, match="a prompt of 64 tokens leaves no room for an answer in a sequence of 64"
    ):
        completion_limit(64, "low", MaxTokens(), 64)


def test_a_dataset_without_documents_is_rejected() -> None:
    with pytest.raises(ValueError, match="no document in any part"):
        WindowSchedule(stage(), 1, [0, 0])
