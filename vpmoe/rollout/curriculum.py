"""The curriculum of an OnPolicy stage: which steps are windows, which version samples them, and what each
phase asks for.

Pure, in exact arithmetic: sampler, teacher and trainer each compute it and must get the same result. Windows
and anchor steps alternate like the steps of a Rescored stage (vpmoe.data.mixture). The phase of a window
follows from the tokens of the stage when its version was published, which every role can add up. How a phase
is spread over prompts is in windows.py.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.stages import OnPolicy
from vpmoe.data.mixture import exact_share
from vpmoe.failure import Permanent

EFFORTS = ("low", "medium", "high")

RAMP = Fraction(1, 4)
"""The share of a phase, at its end, over which rollouts per prompt go linearly from rolloutsPerPrompt to
rolloutsPerPromptAtEnd."""


class Level(NamedTuple):
    """What the curriculum asks for at a point of the stage."""

    phase: int
    """Phase of the curriculum, from 0."""
    effort: tuple[Fraction, ...]
    """Share of prompts at each of EFFORTS; the sum is exactly 1."""
    rollouts: Fraction
    """Mean number of rollouts per prompt."""


class Curriculum:
    """The curriculum of one OnPolicy stage. Steps, windows and versions are numbered from 0."""

    def __init__(self, stage: OnPolicy) -> None:
        """Raises Permanent if no step of the stage would be a window."""
        self.stage = stage
        self._anchor = exact_share(stage.anchor)
        if self._anchor == 1:
            raise Permanent(
                f"stage {stage.name}: anchor is 1 to a millionth, so no step would train on a rollout. "
                "Lower it, or make the stage Vanilla."
            )
        self._ends = [
            end * stage.tokens for end in accumulate(_normalized([phase.share for phase in stage.curriculum]))
        ]
        self._efforts = [
            _normalized([getattr(phase.effort, name) for name in EFFORTS]) for phase in stage.curriculum
        ]

    def step_of(self, window: int) -> int:
        """The step that trains a window; it follows the earlier windows and the anchor steps between them."""
        return int(window / (1 - self._anchor))

    def is_window(self, step: int) -> bool:
        """Whether a step trains a window; otherwise it is an anchor step."""
        return int((step + 1) * self._anchor) == int(step * self._anchor)

    def version_of(self, window: int) -> int:
        """The policy version that a window is sampled from.

        A version's number counts the windows trained before it.

        P·⌊max(0, window − S) / P⌋ with P = publishEvery and S = staleness. Training the earlier windows
        always produces it.
        """
        every = self.stage.publish_every
        return max(0, window - self.stage.staleness) // every * every

    def windows_of(self, version: int) -> range:
        """All windows that are sampled from a published version: the inverse of version_of.

        The stage may end before the last of them.
        """
        staleness, every = self.stage.staleness, self.stage.publish_every
        return range(version + staleness if version else 0, version + staleness + every)

    def steps_trained(self, version: int) -> int:
        """Steps of the stage that a version was trained for: all up to the one of its last window."""
        return self.step_of(version - 1) + 1 if version else 0

    def tokens_before_next(
        self, window: int, seen: int, tokens: int, anchors: Sequence[int] | NDArray[np.int64]
    ) -> int:
        """Tokens of the stage before the step of window + 1.

        The stage has no such window iff they reach its `tokens`.

        `seen`: tokens before the step of this window. `tokens`: of this window, prompts and completions.
        `anchors[n]`: of the stage's first n + 1 anchor steps together, up to the step that alone would reach
        the stage's end (SequenceStream.tokens_after_steps). Padding is not counted.
        """
        reached = [
            int(anchors[min(steps, len(anchors)) - 1]) if steps else 0
            for steps in (self.anchor_steps_before(window), self.anchor_steps_before(window + 1))
        ]
        return seen + tokens + reached[1] - reached[0]

    def anchor_steps_before(self, window: int) -> int:
        """Number of anchor steps before the step of a window."""
        return self.step_of(window) - window

    def level_at(self, tokens: int) -> Level:
        """The curriculum after `tokens` tokens of the stage; beyond the stage's end, that of its end."""
        phase = next((place for place, end in enumerate(self._ends) if tokens < end), len(self._ends) - 1)
        start, end = self._ends[phase - 1] if phase else Fraction(0), self._ends[phase]
        left = max(Fraction(0), (end - tokens) / (end - start))
        settings = self.stage.curriculum[phase]
        at_start, at_end = settings.rollouts_per_prompt, settings.rollouts_per_prompt_at_end
        ramp = max(Fraction(0), 1 - left / RAMP)
        rollouts = at_start + ramp * ((at_start if at_end is None else at_end) - at_start)
        return Level(phase, self._efforts[phase], rollouts)


def _normalized(shares: Sequence[float]) -> tuple[Fraction, ...]:
    """The decimal shares, scaled to add up to exactly 1: the API allows a deviation of a millionth."""
    exact = [exact_share(share) for share in shares]
    return tuple(share / sum(exact) for share in exact)
