"""Curricula: phase, rollouts and effort at a token, the version and step of each window, and the end of the
stage."""

from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.curricula import SHARES, THREE_PHASES, stage
from vpmoe.api.stages import OnPolicy
from vpmoe.data.mixture import exact_share, interleave
from vpmoe.failure import Permanent
from vpmoe.rollout.curriculum import Curriculum

STAGES = st.builds(
    lambda anchor, staleness, every: stage(
        anchor=anchor, staleness=staleness, publishEvery=every, tokens=10_000
    ),
    SHARES,
    st.integers(0, 9),
    st.integers(1, 9),
)
LENGTHS = st.lists(st.integers(1, 900), min_size=60, max_size=60)


@pytest.mark.parametrize(
    "tokens, phase, rollouts",
    [
        pytest.param(0, 0, 1, id="the-beginning"),
        pytest.param(299, 0, 1, id="the-last-token-of-a-phase"),
        pytest.param(300, 1, 1, id="the-first-of-the-next"),
        pytest.param(600, 1, 1, id="where-the-last-quarter-begins"),
        pytest.param(650, 1, Fraction(3, 2), id="half-way-to-the-next-phase"),
        pytest.param(699, 1, Fraction(199, 100), id="just-before-the-next-phase"),
        pytest.param(700, 2, 4, id="the-last-phase"),
        pytest.param(925, 2, 4, id="where-the-last-quarter-of-the-last-phase-begins"),
        pytest.param(970, 2, Fraction(14, 5), id="falling"),
        pytest.param(1000, 2, 2, id="the-end"),
        pytest.param(9999, 2, 2, id="beyond-the-end"),
    ],
)
def test_phase_rollouts_and_effort_at_a_token(tokens: int, phase: int, rollouts: Fraction) -> None:
    level = Curriculum(stage(tokens=1000, curriculum=THREE_PHASES)).level_at(tokens)
    assert (level.phase, level.rollouts) == (phase, rollouts)
    assert level.effort == tuple(
        Fraction(str(THREE_PHASES[phase]["effort"].get(name, 0))) for name in ("low", "medium", "high")
    )  # type: ignore


def test_shares_of_many_digits_add_up_exactly() -> None:
    """The API accepts sums within a millionth of 1 and reads a share to a millionth."""
    effort = {"low": 0.1234567, "medium": 0.3333333, "high": 0.5432102}
    curriculum = Curriculum(stage(tokens=3000, curriculum=[{"share": 0.3333333, "effort": effort}] * 3))
    assert [curriculum.level_at(tokens).phase for tokens in (999, 1000, 1999, 2000, 2999, 3000)] == [
        0,
        1,
        1,
        2,
        2,
        2,
    ]
    assert sum(curriculum.level_at(0).effort) == 1 and curriculum.level_at(0).effort[1] != Fraction(
        "0.3333333"
    )


@pytest.mark.parametrize(
    "staleness, every, versions",
    [
        pytest.param(0, 1, [0, 1, 2, 3, 4, 5, 6], id="no-staleness"),
        pytest.param(2, 1, [0, 0, 0, 1, 2, 3, 4], id="ahead"),
        pytest.param(0, 3, [0, 0, 0, 3, 3, 3, 6], id="rarely-published"),
        pytest.param(2, 2, [0, 0, 0, 0, 2, 2, 4], id="the-defaults"),
        pytest.param(5, 4, [0, 0, 0, 0, 0, 0, 0], id="far-ahead"),
    ],
)
def test_the_version_that_a_window_is_sampled_from(staleness: int, every: int, versions: list[int]) -> None:
    curriculum = Curriculum(stage(staleness=staleness, publishEvery=every))
    assert [curriculum.version_of(window) for window in range(7)] == versions


@given(STAGES, st.integers(0, 10_000))
def test_a_version_is_published_before_its_window_and_not_staler_than_allowed(
    stage: OnPolicy, window: int
) -> None:
    curriculum = Curriculum(stage)
    version = curriculum.version_of(window)
    assert version % stage.publish_every == 0, "the version is published"
    assert version <= max(0, window - stage.staleness), (
        "the sampler may be `staleness` windows ahead of the trainer"
    )
    assert window - version < stage.staleness + stage.publish_every
    assert curriculum.steps_trained(version) <= curriculum.step_of(window), (
        "the version's steps precede the window's"
    )
    assert version <= curriculum.version_of(window + 1)


@given(STAGES, st.integers(0, 200))
def test_the_windows_of_a_version_are_those_sampled_from_it(stage: OnPolicy, published: int) -> None:
    curriculum, version = Curriculum(stage), published * stage.publish_every
    found = curriculum.windows_of(version)
    candidates = range(max(0, found[0] - 30), found[-1] + 30)
    assert list(found) == [window for window in candidates if curriculum.version_of(window) == version]
    assert curriculum.windows_of(version + stage.publish_every)[0] == found[-1] + 1, "no window is missing"
    assert version or found[0] == 0


@given(SHARES)
def test_windows_and_anchor_steps_are_interleaved_like_a_mixture(anchor: float) -> None:
    curriculum = Curriculum(stage(anchor=anchor))
    kind = interleave(400, anchor)
    windows = np.flatnonzero(~kind)
    assert [curriculum.step_of(window) for window in range(len(windows))] == windows.tolist()
    assert [curriculum.is_window(step) for step in range(400)] == (~kind).tolist()


@pytest.mark.parametrize("anchor", [0.0, 0.1, 0.15, 0.29, 0.57, 0.999999])
def test_the_share_of_anchor_steps_is_exact_at_every_window(anchor: float) -> None:
    curriculum, exact = Curriculum(stage(anchor=anchor)), exact_share(anchor)
    for window in (0, 1, 2, 6, 99, 12_345, 10**9 + 7):
        step = curriculum.step_of(window)
        assert curriculum.is_window(step) and step - window == step * exact.numerator // exact.denominator


@given(STAGES, LENGTHS, LENGTHS)
def test_the_tokens_before_a_window_are_those_of_all_earlier_steps(
    stage: OnPolicy, windows: list[int], anchors: list[int]
) -> None:
    curriculum, seen = Curriculum(stage), 0
    remaining_tokens = {True: iter(windows), False: iter(anchors)}
    step_tokens = [next(remaining_tokens[curriculum.is_window(step)], 0) for step in range(60)]
    anchor_tokens = list(accumulate(anchors))
    for window in range(60):
        if curriculum.step_of(window + 1) >= 60:
            break
        seen = curriculum.tokens_before_next(window, seen, windows[window], anchor_tokens)
        assert seen == sum(step_tokens[: curriculum.step_of(window + 1)])


def test_a_stage_ends_with_the_step_that_reaches_its_tokens() -> None:
    curriculum = Curriculum(stage(anchor=0.5, tokens=100))  # alternating, a window first
    assert [curriculum.is_window(step) for step in range(4)] == [True, False, True, False]
    assert curriculum.tokens_before_next(0, 0, 30, [20, 40]) == 50
    assert curriculum.tokens_before_next(1, 50, 30, [20, 40]) == 100


def test_anchor_steps_beyond_the_stages_end_need_not_be_known() -> None:
    """The first two reach the end of the stage, so that later ones are not counted."""
    curriculum = Curriculum(stage(anchor=0.75, tokens=100))
    assert curriculum.anchor_steps_before(1) == 3
    assert curriculum.tokens_before_next(0, 0, 1, [60, 120]) >= 100


def test_a_stage_of_only_anchor_steps_is_rejected() -> None:
    with pytest.raises(
        Permanent, match="stage onpolicy: anchor is 1 to a millionth, so no step would train on a rollout"
    ):
        Curriculum(stage(anchor=0.9999999))
