"""When a stage does what: the learning rate of each step, what happens every so many tokens, whether it ends early. Pure."""

import math
from collections.abc import Sequence

from vpmoe.api.stages import Stop
from vpmoe.checkpoint.train_state import TrainState


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


def due(before: int, after: int, every: int) -> bool:
    """Whether what happens every `every` tokens is due after a step that took the stage from `before` tokens to `after`.

    Of several multiples passed by one step, one counts.
    """
    return after // every > before // every


def no_longer_improves(measured: Sequence[float], stop: Stop) -> bool:
    """Whether the last `stop.evaluations` evaluations together lowered what is measured by less than `stop.min_improvement` of it.

    That is the held-out loss; of an OnPolicy stage the reverse KL over the windows since the evaluation before.
    """
    if len(measured) <= stop.evaluations:
        return False
    before, latest = measured[-1 - stop.evaluations], measured[-1]
    return before - latest < stop.min_improvement * before


def ends_early(position: TrainState, stop: Stop, on_policy: bool) -> bool:
    """Whether a stage that stands there ends before its tokens are spent. It follows from the evaluations in its position alone.

    `stop.min_validity` is of an OnPolicy stage: the share of valid rollouts in the windows since the evaluation before, at the latest one.
    """
    if not on_policy:
        return no_longer_improves(position.held_out, stop)
    windows = position.windows
    return (
        windows is not None
        and windows.validity >= stop.min_validity
        and no_longer_improves(windows.reverse_kl, stop)
    )
