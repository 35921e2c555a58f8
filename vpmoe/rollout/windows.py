"""Windows of prompts: which prompts, efforts, rollouts and seeds belong to window k, and which version of the policy answers them.

A pure function of (stage, seed, documents, tokens of the version, turns): whoever samples a window, whenever, comes to the same, so nothing
about the schedule is stored or sent. What happened to a window is the bucket's business; how a document becomes a prompt is prompt.py's.
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
from vpmoe.data.packing import order
from vpmoe.rollout.back_pressure import Adjustment, heeded
from vpmoe.rollout.curriculum import EFFORTS, Curriculum, Level


@dataclass(frozen=True)
class Prompt:
    """One prompt of a window."""

    place: int
    """In the window, from 0."""
    document: int
    """Number of the training document that it is made of, counted over all parts."""
    effort: str
    seeds: tuple[int, ...]
    """One a rollout, from rollout 0."""


@dataclass(frozen=True)
class Window:
    """The rollouts of one optimizer step, before they are sampled."""

    number: int
    version: int
    """The policy version that all of it is sampled from."""
    phase: int
    """The curriculum's phase, from 0."""
    turns: int
    """Turns of knobs that hold for it."""
    max_tokens: MaxTokens
    """Longest completions after these turns."""
    prompts: tuple[Prompt, ...]


class Windows:
    """The windows of one OnPolicy stage."""

    def __init__(self, stage: OnPolicy, seed: int, documents_in_part: Sequence[int], first: int = 0) -> None:
        """`seed` is training.seed, `documents_in_part` of the training split, `first` how many prompts earlier stages have used.

        Raises ValueError where there is no document, Permanent where the stage has no windows.
        """
        if not sum(documents_in_part):
            raise ValueError("there is no document in any part to make prompts of")
        self.curriculum = Curriculum(stage)
        self._each = stage.rollout.prompts_per_window
        self._seed = seed
        self._documents = sum(documents_in_part)
        self._first = first
        # a window may straddle two epochs; 20 million documents take seconds to order and 80 MB to keep
        self._order = lru_cache(2)(lambda epoch: order(documents_in_part, seed, epoch))

    def window(self, number: int, tokens: int, turns: Sequence[Adjustment] = ()) -> Window:
        """Window `number`. `tokens` are the stage's when the window's version was published (version.Version.tokens), `turns` all so far:
        those of later windows change nothing."""
        turns = heeded(turns, number)
        level = self.curriculum.at(tokens)
        level = level._replace(effort=turned_effort(level.effort, turns))
        prompts = zip(self.documents(number).tolist(), rollouts(level, self._each), strict=True)
        return Window(
            number,
            self.curriculum.version_of(number),
            level.phase,
            len(turns),
            turned_bounds(self.curriculum.stage.rollout.max_tokens, turns),
            tuple(
                Prompt(
                    place,
                    document,
                    effort(level, self._seed, number, place),
                    tuple(request_seed(self._seed, number, place, rollout) for rollout in range(count)),
                )
                for place, (document, count) in enumerate(prompts)
            ),
        )

    def documents(self, number: int) -> NDArray[np.int32]:
        """[promptsPerWindow] the documents of a window: the batch plan's order, every document once before any comes again."""
        start = self._first + number * self._each
        places = np.arange(start, start + self._each)
        epochs, within = places // self._documents, places % self._documents
        return np.concatenate(
            [self._order(int(epoch))[within[epochs == epoch]] for epoch in np.unique(epochs)]
        )


def turned_effort(shares: tuple[Fraction, ...], turns: Sequence[Adjustment]) -> tuple[Fraction, ...]:
    """Shares of EFFORTS after these turns: each of effort gives half of high's share to medium."""
    low, medium, high = shares
    for _ in (turn for turn in turns if turn.knob == "effort"):
        medium, high = medium + high / 2, high / 2
    return low, medium, high


def turned_bounds(max_tokens: MaxTokens, turns: Sequence[Adjustment]) -> MaxTokens:
    """Longest completions after these turns: each of maxTokens makes three quarters of every one, rounded down, and at least 1."""
    for _ in (turn for turn in turns if turn.knob == "maxTokens"):
        max_tokens = MaxTokens(**{name: max(1, getattr(max_tokens, name) * 3 // 4) for name in EFFORTS})
    return max_tokens


def rollouts(level: Level, prompts: int) -> list[int]:
    """Rollouts of each prompt: whole numbers next to the level's mean, spread evenly, ⌊prompts · mean⌋ in all."""
    mean = level.rollouts
    reached = [place * mean.numerator // mean.denominator for place in range(prompts + 1)]  # ⌊place · mean⌋
    return [after - before for before, after in pairwise(reached)]


def effort(level: Level, seed: int, window: int, prompt: int) -> str:
    """The effort that is drawn for one prompt, whatever is drawn for the others."""
    drawn = _hash(b"vpmoe.effort", seed, window, prompt)
    reached = Fraction(0)
    for name, share in zip(EFFORTS, level.effort, strict=True):
        reached += share
        if drawn < reached * 2**64:
            return name
    raise AssertionError("the shares of a level add up to 1")


def request_seed(seed: int, window: int, prompt: int, rollout: int) -> int:
    """The seed that one rollout is sampled with, of 63 bits: vLLM's generators take no more."""
    return _hash(b"vpmoe.rollout", seed, window, prompt, rollout) >> 1


def longest(prompt: int, effort: str, max_tokens: MaxTokens, sequence_length: int) -> int:
    """Tokens that may be sampled after a prompt of so many. Raises ValueError where there is room for none."""
    bound = min(getattr(max_tokens, effort), sequence_length - prompt)
    if bound < 1:
        raise ValueError(
            f"a prompt of {prompt} tokens leaves no room for an answer in a sequence of {sequence_length}"
        )
    return int(bound)


def _hash(what: bytes, *numbers: int) -> int:
    """64 bits, the same on every machine."""
    return int.from_bytes(blake2b("/".join(map(str, numbers)).encode(), digest_size=8, person=what).digest())
