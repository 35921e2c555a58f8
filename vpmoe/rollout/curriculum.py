"""The course of an OnPolicy stage: which of its steps are windows, which version a window is sampled from, and what it asks for.

Pure, and in exact arithmetic: sampler, teacher and trainer each work it out and must come to the same. Windows and anchor steps alternate
as the steps of a Rescored stage do (vpmoe.data.mixture). What a phase holds follows from the tokens that the stage had realised when
the version was published, which every role can add up; how they are spread over prompts is windows.py's business.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.stages import OnPolicy
from vpmoe.data.mixture import as_written
from vpmoe.failure import Permanent

EFFORTS = ("low", "medium", "high")

RISING = Fraction(1, 4)
"""The last part of a phase, over which the rollouts a prompt go from rolloutsPerPrompt to rolloutsPerPromptAtEnd."""


class Level(NamedTuple):
    """What a window asks for."""

    phase: int
    """Of the curriculum's phases, from 0."""
    effort: tuple[Fraction, ...]
    """Share of prompts at each of EFFORTS; they add up to exactly 1."""
    rollouts: Fraction
    """Mean rollouts a prompt."""


class Curriculum:
    """One OnPolicy stage. Steps, windows and versions count from 0."""

    def __init__(self, stage: OnPolicy) -> None:
        """Raises Permanent where no step of the stage would be a window."""
        self.stage = stage
        self._anchor = as_written(stage.anchor)
        if self._anchor == 1:
            raise Permanent(
                f"stage {stage.name}: anchor is 1 to a millionth, so no step would train on a rollout. Lower it, or make the stage Vanilla."
            )
        self._ends = [
            end * stage.tokens for end in accumulate(_to_one([phase.share for phase in stage.curriculum]))
        ]
        self._efforts = [
            _to_one([getattr(phase.effort, name) for name in EFFORTS]) for phase in stage.curriculum
        ]

    def step_of(self, window: int) -> int:
        """The step that trains a window: behind the windows before it and the anchor steps between them."""
        return int(window / (1 - self._anchor))

    def is_window(self, step: int) -> bool:
        """Whether a step trains a window; otherwise it is an anchor step."""
        return int((step + 1) * self._anchor) == int(step * self._anchor)

    def version_of(self, window: int) -> int:
        """The policy version that a window is sampled from: so many windows were trained before it was published.

        P·⌊max(0, window − S) / P⌋ with P = publishEvery and S = staleness: never one that training the windows before would not give.
        """
        every = self.stage.publish_every
        return max(0, window - self.stage.staleness) // every * every

    def windows_of(self, version: int) -> range:
        """All windows that are sampled from a version that is published: those of which version_of says it.

        The stage may end before the last of them.
        """
        staleness, every = self.stage.staleness, self.stage.publish_every
        return range(version + staleness if version else 0, version + staleness + every)

    def published_after(self, version: int) -> int:
        """Steps of the stage that a version has been trained for: up to its last window's, and none beyond."""
        return self.step_of(version - 1) + 1 if version else 0

    def after(self, window: int, seen: int, tokens: int, anchors: Sequence[int] | NDArray[np.int64]) -> int:
        """The stage's tokens before the step of the window after this one. The stage has no such window iff they reach its `tokens`.

        `seen`: the same of this window; `tokens`: of this window itself, prompts and completions; `anchors[n]`: of the stage's first n + 1
        anchor steps together, up to the one that alone would reach the stage's end (BatchPlan.steps). Padding is not counted anywhere.
        """
        reached = [
            int(anchors[min(steps, len(anchors)) - 1]) if steps else 0
            for steps in (self.anchors(window), self.anchors(window + 1))
        ]
        return seen + tokens + reached[1] - reached[0]

    def anchors(self, window: int) -> int:
        """Anchor steps before the step of a window."""
        return self.step_of(window) - window

    def at(self, tokens: int) -> Level:
        """What stands where the stage has seen so many tokens; beyond its end, what stands at its end."""
        phase = next((place for place, end in enumerate(self._ends) if tokens < end), len(self._ends) - 1)
        start, end = self._ends[phase - 1] if phase else Fraction(0), self._ends[phase]
        left = max(Fraction(0), (end - tokens) / (end - start))
        asked = self.stage.curriculum[phase]
        goes_to = (
            asked.rollouts_per_prompt
            if asked.rollouts_per_prompt_at_end is None
            else asked.rollouts_per_prompt_at_end
        )
        risen = max(Fraction(0), 1 - left / RISING)
        rollouts = asked.rollouts_per_prompt + risen * (goes_to - asked.rollouts_per_prompt)
        return Level(phase, self._efforts[phase], rollouts)


def _to_one(shares: Sequence[float]) -> tuple[Fraction, ...]:
    """Shares as they are written, made to add up to exactly 1: the API lets them be a millionth off."""
    exact = [as_written(share) for share in shares]
    return tuple(share / sum(exact) for share in exact)
