"""OnPolicy stages, their curricula and their windows."""

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from tests.fakes import valid_specs
from vpmoe.api import DistillRun
from vpmoe.api.stages import OnPolicy
from vpmoe.rollout.back_pressure import Adjustment
from vpmoe.rollout.windows import WindowPlan, WindowSchedule


def stage(**changes: Any) -> OnPolicy:
    run = DistillRun.parse(valid_specs.manifest({"spec.stages": [{**valid_specs.ONPOLICY, **changes}]}))
    found = run.stage("onpolicy")
    assert isinstance(found, OnPolicy)
    return found


SHARES = st.integers(0, 999).map(lambda thousandths: thousandths / 1000)


THREE_PHASES: list[dict[str, Any]] = [
    {"share": 0.3, "effort": {"low": 0.7, "medium": 0.3}},
    {"share": 0.4, "effort": {"low": 0.2, "medium": 0.6, "high": 0.2}, "rolloutsPerPromptAtEnd": 2},
    {
        "share": 0.3,
        "effort": {"low": 0.1, "medium": 0.3, "high": 0.6},
        "rolloutsPerPrompt": 4,
        "rolloutsPerPromptAtEnd": 2,
    },
]


PARTS = [5, 0, 17, 3]


TOKENS_PER_STEP = 400
"""Tokens of each step before a window's version, in these tests."""


def windows(seed: int = 1234, prompts: int = 4, first: int = 0, **changes: object) -> WindowSchedule:
    fields = {"rollout": {"promptsPerWindow": prompts}, "curriculum": THREE_PHASES, "tokens": 100_000}
    return WindowSchedule(stage(**(fields | changes)), seed, PARTS, first)


def plan_window(it: WindowSchedule, number: int, adjustments: Sequence[Adjustment] = ()) -> WindowPlan:
    """The plan of window `number` if each step before its version had TOKENS_PER_STEP tokens."""
    return it.window(
        number, TOKENS_PER_STEP * it.curriculum.steps_trained(it.curriculum.version_of(number)), adjustments
    )
