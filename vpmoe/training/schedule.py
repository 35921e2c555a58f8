"""When a stage does what: the learning rate of each step, what happens every so many tokens, whether it ends early. Pure."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.stages import Stop


def learning_rate(seen: int, total: int, warmup: int, peak: float, lowest: float) -> float:
    """The rate for the step after which the stage has seen `seen` of its `total` tokens.

    Linear from 0 over the first `warmup` tokens, then half a cosine from `peak` down to `lowest`, which the stage's last step gets.
    Where `warmup` is as long as the stage or longer, the rate rises to the end and never reaches `peak`: the stage is its own warm-up.
    """
    if seen < warmup:
        return peak * seen / warmup
    if total == warmup:
        return peak
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * (seen - warmup) / (total - warmup)))


def due(seen_T: NDArray[np.int64], step: int, every: int) -> bool:
    """Whether what happens every `every` tokens is due after `step` (from 0): its tokens passed a multiple. The last step is always due.

    seen_T: tokens seen after each step. Of several multiples passed by one step, one counts.
    """
    before = int(seen_T[step - 1]) if step else 0
    return step == len(seen_T) - 1 or int(seen_T[step]) // every > before // every


def no_longer_improves(held_out: Sequence[float], stop: Stop) -> bool:
    """Whether the last `stop.evaluations` evaluations together improved the held-out loss by less than `stop.min_improvement` of it."""
    if len(held_out) <= stop.evaluations:
        return False
    before, latest = held_out[-1 - stop.evaluations], held_out[-1]
    return before - latest < stop.min_improvement * before
