"""Decides which rows are kept, which are held out, and which reasoning effort each has. A pure function of
each row's id and of the census of all rows (census.py).

A row's id is hashed to a number in [0, 1). The row is kept if the number is below the threshold of its class,
so all workers decide alike, in any order. Different hashes of the id decide the split and the effort.
"""

from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.effort import Effort, effort_shares
from vpmoe.data.dataset import clean_label
from vpmoe.failure import Permanent

BINS = 1024
"""Hash bins of the census, and so the resolution of a threshold: shares are met within 0.1 % and never
exceeded."""

MEMORIZATION, FOREIGN = 1, 2
"""Bits of a row's class: 0 none, 1 memorization, 2 not English, 3 both."""

ENGLISH = ("en", "eng", "english")

Histogram = NDArray[np.int64]
"""[4, BINS] rows of each class in each hash bin"""


@dataclass(frozen=True)
class Thresholds:
    """A row of class c is kept if its hash bin is below `bins[c]`; BINS keeps all rows."""

    bins: tuple[int, int, int, int]

    def keeps(self, row_class: int, row_id: str) -> bool:
        return hash_bin(row_id) < self.bins[row_class]

    def shares(self) -> dict[str, float]:
        """The kept share of each class, by the names in the manifest."""
        names = ("other", "memorization", "nonEnglish", "nonEnglishMemorization")
        return {name: count / BINS for name, count in zip(names, self.bins, strict=True)}


def row_class(language: str | None, exercise: str | None) -> int:
    """A row's class. A row without language counts as English, one without exercise not as memorization."""
    language, exercise = clean_label(language), clean_label(exercise)
    memorized = exercise is not None and exercise.casefold() == "memorization"
    foreign = language is not None and language.casefold().replace("_", "-").partition("-")[0] not in ENGLISH
    return MEMORIZATION * memorized + FOREIGN * foreign


def hash_bin(row_id: str) -> int:
    """The bin in [0, BINS) that decides whether a row is kept. Independent of the split's hash, so both
    splits are sampled alike."""
    return (
        int.from_bytes(blake2b(row_id.encode(), digest_size=8, person=b"vpmoe.sampling").digest()) * BINS
        >> 64
    )


def is_valid(row_id: str, valid_fraction: float) -> bool:
    """Whether a row is held out: blake2b-64 of its id, as a big-endian fraction of 2^64, is below
    `valid_fraction`."""
    return int.from_bytes(blake2b(row_id.encode(), digest_size=8).digest()) < valid_fraction * 2**64


def draw_effort(row_id: str, mix: str) -> Effort:
    """The effort of a row's document: the first of the EffortMix whose cumulative share is above blake2b-64
    of the row's id, as a big-endian fraction of 2^64."""
    bounds = _effort_bounds(mix)
    if len(bounds) == 1:
        return bounds[0][0]
    drawn = int.from_bytes(blake2b(row_id.encode(), digest_size=8, person=b"vpmoe.doc_effort").digest())
    return next(effort for effort, bound in bounds if drawn < bound)


@cache
def _effort_bounds(mix: str) -> list[tuple[Effort, int]]:
    """Each effort with its cumulative share, in units of 2^-64; the last is 2^64."""
    shares = effort_shares(mix)
    return [
        (effort, int(share * 2**64))
        for effort, share in zip(shares, accumulate(shares.values()), strict=True)
    ]


def choose_thresholds(
    rows_4B: Histogram, keep: float, memorization_max: float, non_english_max: float
) -> Thresholds:
    """The highest thresholds for which neither share exceeds its bound, counted over the census.

    Every class is reduced to the share `keep`; then memorization rows to a share a, rows that are not English
    to a share b, and rows that are both to a·b. b is the largest value for which some a meets both bounds; a
    is the largest value for that b. Raises Permanent if the bounds can only be met by dropping every row.
    """
    # [4, BINS + 1] rows in the first n bins
    below_4B = np.concatenate([np.zeros((4, 1), dtype=np.int64), np.cumsum(rows_4B, axis=1)], axis=1)
    share_A = np.arange(BINS, -1, -1) / BINS  # from 1 to 0
    for share_b in share_A:
        bins_4A = _bins(keep, share_A, share_b)
        kept_4A = np.take_along_axis(below_4B, bins_4A, axis=1)
        total_A = kept_4A.sum(axis=0)
        # The largest a that meets the bound; a = 0 always does.
        first = int(np.argmax(kept_4A[MEMORIZATION] + kept_4A[3] <= memorization_max * total_A))
        if kept_4A[FOREIGN, first] + kept_4A[3, first] <= non_english_max * total_A[first]:
            chosen = Thresholds(tuple(int(count) for count in bins_4A[:, first]))  # type: ignore[arg-type]
            _check_something_is_left(rows_4B, int(total_A[first]), keep, memorization_max, non_english_max)
            return chosen
    raise AssertionError("b = 0 meets any bound, because it drops all rows that are not English")


def _bins(keep: float, share_A: NDArray[np.float64], share_b: float) -> NDArray[np.int64]:
    """[4, A] the threshold of each class for each share a, at one share b."""
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
        f"dataset.sampling keeps none of {rows.sum()} rows: {rows[MEMORIZATION] + rows[3]} are memorization "
        f"(memorizationMax {memorization_max}), {rows[FOREIGN] + rows[3]} are not English "
        f"(nonEnglishMax {non_english_max}), keep is {keep}. Raise the bound that the input cannot meet, up "
        "to 1."
    )
