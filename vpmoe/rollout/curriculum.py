"""The course of an OnPolicy stage: which of its steps are windows, which version a window is sampled from, and what it asks for.

Pure, and in exact arithmetic: sampler, teacher and trainer each work it out and must come to the same. Windows and anchor steps alternate
as the steps of a Rescored stage do (vpmoe.training.mixture). What a phase holds follows from the tokens that the stage had realised when
the version was published, which every role can add up; how they are spread over prompts is windows.py's business.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.stages import OnPolicy
from vpmoe.failure import Permanent
from vpmoe.training.mixture import as_written, interleave

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
        self._ends = [end * stage.tokens for end in accumulate(_to_one([phase.share for phase in stage.curriculum]))]
        self._efforts = [_to_one([getattr(phase.effort, name) for name in EFFORTS]) for phase in stage.curriculum]

    def step_of(self, window: int) -> int:
        """The step that trains a window. Before it come the windows before it, and step − window anchor steps."""
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

    def published_after(self, version: int) -> int:
        """Steps of the stage that a version has been trained for: up to its last window's, and none beyond."""
        return self.step_of(version - 1) + 1 if version else 0

    def seen(self, windows: Sequence[int], anchors: Sequence[int]) -> NDArray[np.int64]:
        """[steps + 1] tokens of the stage after its first 0, 1, … steps, as far as both are known.

        `windows`, `anchors`: tokens, padding excluded, of each window from the first on, and of each anchor step.
        """
        kind = interleave(len(windows) + len(anchors), self.stage.anchor)
        each, whole = np.empty(len(kind), np.int64), len(kind)
        for known, chosen in ((windows, ~kind), (anchors, kind)):
            places = np.flatnonzero(chosen)
            each[places[: len(known)]] = known[: len(places)]
            if len(places) > len(known):
                whole = min(whole, int(places[len(known)]))
        return np.concatenate([[0], np.cumsum(each[:whole])])

    def belongs(self, window: int, seen: Sequence[int] | NDArray[np.int64]) -> bool:
        """Whether the stage has this window: it ends with the step that reaches its tokens. Raises ValueError where `seen` is too short.

        Whoever has sampled the windows before this one knows, however far behind the trainer is.
        """
        return _at(seen, self.step_of(window)) < self.stage.tokens

    def of(self, window: int, seen: Sequence[int] | NDArray[np.int64]) -> Level:
        """What a window asks for: by the tokens that its version was trained on, and by no later ones.

        `seen[n]` are the stage's tokens after n steps; raises ValueError where it ends before the version was published.
        """
        return self.at(_at(seen, self.published_after(self.version_of(window))))

    def at(self, tokens: int) -> Level:
        """What stands where the stage has seen so many tokens; beyond its end, what stands at its end."""
        phase = next((place for place, end in enumerate(self._ends) if tokens < end), len(self._ends) - 1)
        start, end = self._ends[phase - 1] if phase else Fraction(0), self._ends[phase]
        left = max(Fraction(0), (end - tokens) / (end - start))
        asked = self.stage.curriculum[phase]
        goes_to = asked.rollouts_per_prompt if asked.rollouts_per_prompt_at_end is None else asked.rollouts_per_prompt_at_end
        risen = max(Fraction(0), 1 - left / RISING)
        rollouts = asked.rollouts_per_prompt + risen * (goes_to - asked.rollouts_per_prompt)
        return Level(phase, self._efforts[phase], rollouts)


def _to_one(shares: Sequence[float]) -> tuple[Fraction, ...]:
    """Shares as they are written, made to add up to exactly 1: the API lets them be a millionth off."""
    exact = [as_written(share) for share in shares]
    return tuple(share / sum(exact) for share in exact)


def _at(seen: Sequence[int] | NDArray[np.int64], steps: int) -> int:
    if steps >= len(seen):
        raise ValueError(f"tokens of the stage are known after {len(seen) - 1} steps, and wanted after {steps}")
    return int(seen[steps])
