"""Centre m of the confidence weights of each span, computed from the exact histogram of the teacher's scores.
Pure numpy.

With this m the mean weight over all scored tokens is 1. So the ratio w_reasoning : w_final and the mix of
batches keep their meaning, and both ends of the clip can bind. The weights are applied in rescored.py.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.stages import Confidence


def centre(histogram: Sequence[Sequence[int]], confidence: Confidence) -> float:
    """m, in nats, with Σ count · clip(exp((x − m) / T), min, max) = Σ count.

    The sums are over the histogram's [[bits of float16 x, count], …]. An empty histogram gives 0. The mean
    falls from max to min as m rises, so there is one such m, or a range of them in which all weights are 1.
    Of a range the end is returned at which the bound that is 1 holds for every x. Found by bisection, to the
    last bit.
    """
    if not histogram:
        return 0.0
    bits, counts = np.asarray(histogram, np.int64).T
    values = bits.astype(np.uint16).view(np.float16).astype(np.float64)
    if confidence.min == 1:
        return float(values.max())
    if confidence.max == 1:
        return float(values.min())
    low = float(values.min()) - confidence.temperature * math.log(confidence.max)
    high = float(values.max()) - confidence.temperature * math.log(confidence.min)
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        if weights(values, middle, confidence) @ counts > counts.sum():
            low = middle
        else:
            high = middle


def weights(values: NDArray[np.float64], centre: float, confidence: Confidence) -> NDArray[np.float64]:
    """clip(exp((x − m) / T), min, max) of log-probabilities x."""
    with np.errstate(over="ignore"):  # an overflow is clipped
        return np.clip(np.exp((values - centre) / confidence.temperature), confidence.min, confidence.max)
