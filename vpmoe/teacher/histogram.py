"""Exact histograms of stored log-probabilities: a float16 has only 65,536 values.

They are in the manifest of the scores, in sparse form. vpmoe.objectives.confidence computes a stage's centre
from them.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CODES = 1 << 16
"""Number of float16 bit patterns."""


def sparse(counts: NDArray[np.int64]) -> list[list[int]]:
    """[[bits of the float16, count], …], ordered by bits, without zero counts."""
    bits = np.flatnonzero(counts)
    return [list(pair) for pair in zip(bits.tolist(), counts[bits].tolist(), strict=True)]


def dense(histogram: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """The counts that `sparse` was given, [CODES]."""
    counts = np.zeros(CODES, np.int64)
    for bits, count in histogram:
        counts[bits] += count
    return counts


def mean(counts: NDArray[np.int64]) -> float | None:
    """Mean of the counted values, in float64; None if there are none."""
    bits = np.flatnonzero(counts)
    values = bits.astype(np.uint16).view(np.float16).astype(np.float64)
    return float(values @ counts[bits] / counts.sum()) if len(bits) else None
