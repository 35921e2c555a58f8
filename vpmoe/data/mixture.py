"""Which data each optimizer step of a stage reads: the whole training split, or the documents that the
teacher scored. Pure.

Every step is either plain or scored. The stage's share alone decides which: ⌊n·share⌋ of the first n steps
are scored, exactly. Each kind reads its own stream, one position after the other (packing.py). OnPolicy
stages place their anchor steps by the same rule (vpmoe.rollout.curriculum).
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Mixture:
    """The data of each step of one stage."""

    scored: NDArray[np.bool_]
    """[steps] whether the step reads scored documents."""
    seen: NDArray[np.int64]
    """[steps] tokens of the stage after each step, excluding padding."""

    def index_in_stream(self, step: int) -> int:
        """The number of earlier steps of the same kind: the step's index in its stream."""
        kind = self.scored if self.scored[step] else ~self.scored
        return int(kind[:step].sum())

    def steps_by_kind(self, steps: int) -> tuple[int, int]:
        """The numbers of (plain, scored) steps among the first `steps` steps."""
        scored = int(self.scored[:steps].sum())
        return steps - scored, scored


def exact_share(share: float) -> Fraction:
    """The decimal value of a share, to a millionth. In binary 100 × 0.29 is less than 29, and a step would
    come too late."""
    return Fraction(str(share)).limit_denominator(1_000_000)


def interleave(steps: int, share: float) -> NDArray[np.bool_]:
    """[steps] whether step n belongs to the kind with this share: iff ⌊(n + 1)·share⌋ > ⌊n·share⌋, in exact
    arithmetic."""
    exact = exact_share(share)
    reached = np.arange(steps + 1, dtype=np.int64) * exact.numerator // exact.denominator
    found: NDArray[np.bool_] = np.diff(reached) > 0
    return found


def mix_streams(plain: NDArray[np.int64], scored: NDArray[np.int64], share: float, tokens: int) -> Mixture:
    """The steps of a stage that ends with the step that reaches `tokens`.

    `plain`, `scored`: tokens after each step of that stream alone, up to the step that reaches `tokens`
    (SequenceStream.tokens_after_steps). A stream that the share never selects may be empty.
    """
    kind = interleave(len(plain) + len(scored), share)
    each = np.empty(len(kind), np.int64)
    whole = len(kind)
    for alone, chosen in ((plain, ~kind), (scored, kind)):
        places = np.flatnonzero(chosen)
        within = places[: len(alone)]
        each[within] = np.diff(alone, prepend=0)[: len(within)]
        if len(places) > len(alone):
            whole = min(whole, int(places[len(alone)]))  # this stream alone reaches `tokens` before this step
    seen = np.cumsum(each[:whole])
    steps = int(np.searchsorted(seen, tokens)) + 1
    return Mixture(kind[:steps], seen[:steps])
