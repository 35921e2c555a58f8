"""The schedule of windows: the prompts, efforts, rollouts and seeds of window k, and the policy version that
samples it.

A pure function of (stage, seed, documents, tokens of the version, adjustments). Each role computes the
schedule; none is stored or exchanged. How a document becomes a prompt is in prompts.py; what happened to a
window is in its files (window_files.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.stages import MaxTokens, OnPolicy
from vpmoe.data.packing import epoch_order
from vpmoe.rollout.back_pressure import Adjustment, applies_to
from vpmoe.rollout.curriculum import EFFORTS, Curriculum, Level


@dataclass(frozen=True)
class PromptPlan:
    """A prompt of a window, before it is sampled."""

    place: int
    """Index in the window, from 0."""
    document: int
    """Number of the training document that it is made of, counted over all parts."""
    effort: str
    seeds: tuple[int, ...]
    """One for each rollout."""


@dataclass(frozen=True)
class WindowPlan:
    """A window: the rollouts of one optimizer step, before they are sampled."""

    number: int
    version: int
    """The policy version that it is sampled from."""
    phase: int
    """Phase of the curriculum, from 0."""
    adjustments: int
    """Number of adjustments that apply to it."""
    max_tokens: MaxTokens
    """Completion limits after these adjustments."""
    prompts: tuple[PromptPlan, ...]


class WindowSchedule:
    """The schedule of one OnPolicy stage."""

    def __init__(self, stage: OnPolicy, seed: int, documents_in_part: Sequence[int], first: int = 0) -> None:
        """`documents_in_part`: of the training split. `first`: number of prompts that earlier stages used.

        Raises ValueError if there is no document, Permanent if the stage has no windows.
        """
        if not sum(documents_in_part):
            raise ValueError("there is no document in any part to make prompts of")
        self.curriculum = Curriculum(stage)
        self._each = stage.rollout.prompts_per_window
        self._seed = seed
        self._documents = sum(documents_in_part)
        self._first = first
        # Two, because a window may straddle two epochs. 20 million documents take seconds to order and 80 MB.
        self._order = lru_cache(2)(lambda epoch: epoch_order(documents_in_part, seed, epoch))

    def window(self, number: int, tokens: int, adjustments: Sequence[Adjustment] = ()) -> WindowPlan:
        """Window `number`.

        `tokens`: those of the stage when the window's version was published (PolicyVersion.tokens).
        `adjustments`: all so far; those of later windows have no effect.
        """
        adjustments = applies_to(adjustments, number)
        level = self.curriculum.level_at(tokens)
        level = level._replace(effort=adjusted_effort(level.effort, adjustments))
        prompts = zip(self.documents(number).tolist(), rollouts_per_prompt(level, self._each), strict=True)
        return WindowPlan(
            number,
            self.curriculum.version_of(number),
            level.phase,
            len(adjustments),
            adjusted_max_tokens(self.curriculum.stage.rollout.max_tokens, adjustments),
            tuple(
                PromptPlan(
                    place,
                    document,
                    draw_effort(level, self._seed, number, place),
                    tuple(request_seed(self._seed, number, place, rollout) for rollout in range(count)),
                )
                for place, (document, count) in enumerate(prompts)
            ),
        )

    def documents(self, number: int) -> NDArray[np.int32]:
        """[promptsPerWindow] documents of a window, in the batch plan's order: each once per epoch."""
        start = self._first + number * self._each
        places = np.arange(start, start + self._each)
        epochs, within = places // self._documents, places % self._documents
        return np.concatenate(
            [self._order(int(epoch))[within[epochs == epoch]] for epoch in np.unique(epochs)]
        )


def adjusted_effort(shares: tuple[Fraction, ...], adjustments: Sequence[Adjustment]) -> tuple[Fraction, ...]:
    """Shares of EFFORTS after the adjustments.

    Each adjustment of `effort` moves half of high's share to medium.
    """
    low, medium, high = shares
    for _ in (adjustment for adjustment in adjustments if adjustment.setting == "effort"):
        medium, high = medium + high / 2, high / 2
    return low, medium, high


def adjusted_max_tokens(max_tokens: MaxTokens, adjustments: Sequence[Adjustment]) -> MaxTokens:
    """Completion limits after the adjustments.

    Each adjustment of `maxTokens` multiplies all by 3/4, rounded down, at least 1.
    """
    for _ in (adjustment for adjustment in adjustments if adjustment.setting == "maxTokens"):
        max_tokens = MaxTokens(**{name: max(1, getattr(max_tokens, name) * 3 // 4) for name in EFFORTS})
    return max_tokens


def rollouts_per_prompt(level: Level, prompts: int) -> list[int]:
    """Number of rollouts of each prompt: the level's mean rounded up or down, spread evenly, ⌊prompts · mean⌋
    in all."""
    mean = level.rollouts
    reached = [place * mean.numerator // mean.denominator for place in range(prompts + 1)]  # ⌊place · mean⌋
    return [after - before for before, after in pairwise(reached)]


def draw_effort(level: Level, seed: int, window: int, prompt: int) -> str:
    """The effort of a prompt, drawn by a hash and independently of other prompts."""
    drawn = _hash(b"vpmoe.effort", seed, window, prompt)
    reached = Fraction(0)
    for name, share in zip(EFFORTS, level.effort, strict=True):
        reached += share
        if drawn < reached * 2**64:
            return name
    raise AssertionError("the shares of a level add up to 1")


def request_seed(seed: int, window: int, prompt: int, rollout: int) -> int:
    """Sampling seed of a rollout, 63 bits: the most that vLLM's generators accept."""
    return _hash(b"vpmoe.rollout", seed, window, prompt, rollout) >> 1


def completion_limit(prompt: int, effort: str, max_tokens: MaxTokens, sequence_length: int) -> int:
    """Tokens that may be sampled after a prompt of `prompt` tokens.

    Raises ValueError if there is room for none.
    """
    bound = min(getattr(max_tokens, effort), sequence_length - prompt)
    if bound < 1:
        raise ValueError(
            f"a prompt of {prompt} tokens leaves no room for an answer in a sequence of {sequence_length}"
        )
    return int(bound)


def _hash(what: bytes, *numbers: int) -> int:
    """64-bit hash, the same on every machine."""
    return int.from_bytes(blake2b("/".join(map(str, numbers)).encode(), digest_size=8, person=what).digest())
