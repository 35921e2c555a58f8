"""OnPolicy stages, their curricula, and the windows that these define."""

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


THREE = [
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


A_STEP = 400
"""Tokens of a step, in the stages of these tests."""


def windows(seed: int = 1234, prompts: int = 4, first: int = 0, **changes: object) -> WindowSchedule:
    asked = {"rollout": {"promptsPerWindow": prompts}, "curriculum": THREE, "tokens": 100_000}
    return WindowSchedule(stage(**(asked | changes)), seed, PARTS, first)


def at(it: WindowSchedule, number: int, turns: Sequence[Adjustment] = ()) -> WindowPlan:
    """Window `number` where each step before its version had A_STEP tokens."""
    return it.window(number, A_STEP * it.curriculum.steps_trained(it.curriculum.version_of(number)), turns)
