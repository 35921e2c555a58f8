"""How much of the data is kept, and which of it is held out: a pure function of each row's id and of one census of all rows.

A row's id is hashed to a number in [0, 1). It is kept where that number lies below the threshold of its class, so every worker
decides alike, in any order and any number of times. Another hash of the id makes the split. What is wrong with a row is
filters.py's business, counting rows in the input census.py's.
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from vpmoe.failure import Permanent

BINS = 1024
"""Hash bins of the census, and so the steps in which a threshold can be set: shares are met within 0.1 %, and never exceeded."""

MEMORIZATION, FOREIGN = 1, 2
"""Bits of a row's class: 0 neither, 1 memorization, 2 not English, 3 both."""

ENGLISH = ("en", "eng", "english")

Histogram = NDArray[np.int64]
"""[4, BINS]: rows of each class in each hash bin."""


@dataclass(frozen=True)
class Thresholds:
    """Rows of class c are kept where their hash bin lies below `bins[c]` (of BINS)."""

    bins: tuple[int, int, int, int]

    def keeps(self, row_class: int, row_id: str) -> bool:
        return hash_bin(row_id) < self.bins[row_class]

    def facts(self) -> dict[str, float]:
        """The share of each class that is kept, for the manifest."""
        names = ("other", "memorization", "nonEnglish", "nonEnglishMemorization")
        return {name: count / BINS for name, count in zip(names, self.bins, strict=True)}


def row_class(language: str | None, exercise: str | None) -> int:
    """A row's class. One without language or exercise counts as neither foreign nor memorization."""
    memorized = exercise is not None and exercise.strip().casefold() == "memorization"
    tag = language.strip().casefold().replace("_", "-").partition("-")[0] if language is not None else ""
    return MEMORIZATION * memorized + FOREIGN * (tag != "" and tag not in ENGLISH)


def hash_bin(row_id: str) -> int:
    """The bin in [0, BINS) that decides whether a row is kept. Not the split's hash, or all that is held out would be kept alike."""
    return (
        int.from_bytes(blake2b(row_id.encode(), digest_size=8, person=b"vpmoe.sampling").digest()) * BINS
        >> 64
    )


def is_valid(row_id: str, valid_fraction: float) -> bool:
    """Whether a row is held out: blake2b-64 of its id, read as a big-endian fraction of 2^64, lies below `valid_fraction`."""
    return int.from_bytes(blake2b(row_id.encode(), digest_size=8).digest()) < valid_fraction * 2**64


def thresholds(
    rows_4B: Histogram, keep: float, memorization_max: float, non_english_max: float
) -> Thresholds:
    """The highest thresholds at which neither share is above its bound, counted over the census.

    Every class is first thinned to `keep`; of that, memorization to a share a and foreign rows to a share b, rows of both to a·b.
    b is the largest for which some a meets both bounds, and a the largest for that b. Raises Permanent when a bound can only be met
    by dropping a class that is all there is.
    """
    below_4B = np.concatenate(
        [np.zeros((4, 1), dtype=np.int64), np.cumsum(rows_4B, axis=1)], axis=1
    )  # rows in the first n bins
    share_A = np.arange(BINS, -1, -1) / BINS  # from all to nothing
    for share_b in share_A:
        bins_4A = _bins(keep, share_A, share_b)
        kept_4A = np.take_along_axis(below_4B, bins_4A, axis=1)
        total_A = kept_4A.sum(axis=0)
        first = int(
            np.argmax(kept_4A[MEMORIZATION] + kept_4A[3] <= memorization_max * total_A)
        )  # a = 0 always meets it
        if kept_4A[FOREIGN, first] + kept_4A[3, first] <= non_english_max * total_A[first]:
            chosen = Thresholds(tuple(int(count) for count in bins_4A[:, first]))  # type: ignore[arg-type]
            _check_something_is_left(rows_4B, int(total_A[first]), keep, memorization_max, non_english_max)
            return chosen
    raise AssertionError("with b = 0 no foreign row is kept, which meets any bound")


def _bins(keep: float, share_A: NDArray[np.float64], share_b: float) -> NDArray[np.int64]:
    """[4, A]: the threshold of each class for each share of memorization, at one share of foreign rows."""
    ones_A = np.ones_like(share_A)
    rates_4A = np.stack([ones_A, share_A, share_b * ones_A, share_A * share_b])
    return np.floor(keep * rates_4A * BINS + 1e-9).astype(np.int64)


def _check_something_is_left(
    rows_4B: Histogram, kept: int, keep: float, memorization_max: float, non_english_max: float
) -> None:
    rows = rows_4B.sum(axis=1)
    if kept or rows.sum() == 0:
        return
    raise Permanent(
        f"dataset.sampling keeps none of {rows.sum()} rows: {rows[MEMORIZATION] + rows[3]} are memorization (memorizationMax "
        f"{memorization_max}), {rows[FOREIGN] + rows[3]} are not English (nonEnglishMax {non_english_max}), keep is {keep}. "
        "Raise the bound that the input cannot meet, up to 1."
    )
