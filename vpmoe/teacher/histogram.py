"""Histograms of log-probabilities as they are stored: exact, since a float16 has only 65,536 values.

They stand in the scores' manifest, sparse; what a stage computes from them is the objective's business.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CODES = 1 << 16
"""Values that a float16 can have."""


def sparse(counts: NDArray[np.int64]) -> list[list[int]]:
    """[[bits of the float16, how often], …] by bits, without those that never occur. Exact: it has each value that is stored."""
    bits = np.flatnonzero(counts)
    return [list(pair) for pair in zip(bits.tolist(), counts[bits].tolist(), strict=True)]


def dense(histogram: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """The counts that `sparse` was given."""
    counts = np.zeros(CODES, np.int64)
    for bits, count in histogram:
        counts[bits] += count
    return counts


def mean(counts: NDArray[np.int64]) -> float | None:
    """Mean of the values that a histogram counts, in float64; None where there are none."""
    bits = np.flatnonzero(counts)
    values = bits.astype(np.uint16).view(np.float16).astype(np.float64)
    return float(values @ counts[bits] / counts.sum()) if len(bits) else None
