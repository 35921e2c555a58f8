"""When a stage does what: the learning rate of each step, what happens at multiples of some tokens, and when
it stops improving. Pure."""

import math
from collections.abc import Sequence

from vpmoe.api.stages import Stop


def learning_rate(seen: int, total: int, warmup: int, peak: float, lowest: float) -> float:
    """The rate for the step after which the stage has seen `seen` of its `total` tokens.

    Linear from 0 over the first `warmup` tokens, then half a cosine from `peak` down to `lowest`, which the
    stage's last step gets. If `warmup` is as long as the stage or longer, the rate rises to the end and
    never reaches `peak`.
    """
    if seen < warmup:
        return peak * seen / warmup
    if total == warmup:
        return peak
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * (seen - warmup) / (total - warmup)))


def due(before: int, after: int, every: int) -> bool:
    """Whether what happens every `every` tokens is due after a step that took the stage from `before` tokens
    to `after`.

    A step that passes several multiples counts once.
    """
    return after // every > before // every


def no_longer_improves(measured: Sequence[float], stop: Stop) -> bool:
    """Whether the last `stop.evaluations` evaluations together lowered what is measured by less than
    `stop.min_improvement` of it."""
    if len(measured) <= stop.evaluations:
        return False
    before, latest = measured[-1 - stop.evaluations], measured[-1]
    return before - latest < stop.min_improvement * before
