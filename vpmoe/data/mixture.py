"""Which data each step of a stage takes: the whole training split, or the documents that the teacher has scored. Pure.

A step is of one kind, and which steps are of which follows from the stage's share alone, exactly: after n steps ⌊n·share⌋ of them were
scored ones. Each kind reads a stream of its own, which goes on where it was left. What stands in a stream is plan.py's business. The
anchor steps of an OnPolicy stage come by the same rule (vpmoe.rollout.curriculum).
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Mixture:
    """The steps of one stage."""

    scored: NDArray[np.bool_]
    """[steps] whether a step is of the scored documents."""
    seen: NDArray[np.int64]
    """[steps] tokens of the stage after each step, padding excluded."""

    def turn(self, step: int) -> int:
        """How many steps of its own kind there were before `step`: its place in its stream."""
        kind = self.scored if self.scored[step] else ~self.scored
        return int(kind[:step].sum())

    def turns(self, steps: int) -> tuple[int, int]:
        """Of the first `steps` steps, how many were (plain, scored)."""
        scored = int(self.scored[:steps].sum())
        return steps - scored, scored


def as_written(share: float) -> Fraction:
    """A share as it is written, to a millionth. In binary 100 × 0.29 is a little less than 29, and a step would come too late."""
    return Fraction(str(share)).limit_denominator(1_000_000)


def interleave(steps: int, share: float) -> NDArray[np.bool_]:
    """[steps] whether step n is of the kind that has this share of them: iff ⌊(n + 1)·share⌋ > ⌊n·share⌋, in exact arithmetic."""
    exact = as_written(share)
    reached = np.arange(steps + 1, dtype=np.int64) * exact.numerator // exact.denominator
    found: NDArray[np.bool_] = np.diff(reached) > 0
    return found


def mix(plain: NDArray[np.int64], scored: NDArray[np.int64], share: float, tokens: int) -> Mixture:
    """A stage that ends with the step that reaches `tokens`.

    `plain`, `scored`: tokens seen after each step of either stream alone, up to the step that reaches `tokens` (BatchPlan.steps); one that
    the share never asks for may be empty.
    """
    kind = interleave(len(plain) + len(scored), share)
    each = np.empty(len(kind), np.int64)
    whole = len(kind)
    for alone, chosen in ((plain, ~kind), (scored, kind)):
        places = np.flatnonzero(chosen)
        within = places[: len(alone)]
        each[within] = np.diff(alone, prepend=0)[: len(within)]
        if len(places) > len(alone):
            whole = min(whole, int(places[len(alone)]))  # from here on a stream alone would have been enough
    seen = np.cumsum(each[:whole])
    steps = int(np.searchsorted(seen, tokens)) + 1
    return Mixture(kind[:steps], seen[:steps])
