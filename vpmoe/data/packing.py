"""The batch plan: which documents make up step n of a data stream, on which rank.

A pure function of the parts' document lengths, the seed and the sequence length, so a resumed run needs no data state, ranks agree
without talking, and each knows what to fetch next. The stream is epoch 0's sequences, then epoch 1's, and so on; a step takes the next
S of them and may straddle two epochs. Reading the documents is cache.py's business, making tensors of them batch.py's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

INTERLEAVED = 32
"""Parts that are read at the same time, at least (all of them where there are fewer): a shard is often all of one exercise."""
NEIGHBOURHOOD = 1024
"""Documents by which one may move from its place in its part: far enough to be new company each epoch, near enough for long reads."""
WINDOW = 1024
"""Documents that are packed among themselves; windows know nothing of each other and are packed all at once."""
OPEN = 8
"""Sequences of a window that are open at the same time. On lengths like SYNTH's 1.2 % of the positions stay empty (1: 11 %)."""


class PackedDocument(NamedTuple):
    """One document of the data set, and how many tokens it has."""

    part: int
    number: int
    """Its place in the part."""
    length: int


@dataclass(frozen=True)
class Epoch:
    """One pass over every document: sequence i holds documents `documents_D[starts_N[i]:starts_N[i + 1]]`."""

    documents_D: NDArray[np.int32]
    """Numbers of documents, counted over all parts."""
    starts_N: NDArray[np.int64]
    """[sequences + 1]"""
    tokens_N: NDArray[np.int64]
    """Tokens in each sequence, padding excluded."""


def firsts(documents_in_part: Sequence[int]) -> NDArray[np.int64]:
    """[parts + 1] number of the first document of each part, and of all documents."""
    return np.concatenate([[0], np.cumsum(documents_in_part, dtype=np.int64)])


def order(documents_in_part: Sequence[int], seed: int, epoch: int) -> NDArray[np.int32]:
    """The order in which an epoch visits all documents, each exactly once.

    Parts are dealt into groups of INTERLEAVED to 2·INTERLEAVED − 1, and the groups are read one after another. Inside a group a document's
    place is its relative position in its part, moved by up to NEIGHBOURHOOD documents: so every part of the group is read from a seeded
    starting point to its end at an even pace, and the reads of each are long ranges.
    """
    random = np.random.default_rng([seed, epoch])
    first_document = firsts(documents_in_part)
    parts = random.permutation(np.flatnonzero(np.asarray(documents_in_part)))
    result = []
    for group in np.array_split(parts, max(1, len(parts) // INTERLEAVED)):
        keys, documents = [], []
        for part in group:
            n = int(documents_in_part[part])
            near = min(n, NEIGHBOURHOOD)
            start = random.integers(n)
            documents.append(first_document[part] + np.roll(np.arange(n, dtype=np.int32), -start))
            keys.append((np.arange(n) + random.random(n) * near) / (n + near))
        # stable: which of two equal keys comes first must not depend on the processor's vector instructions
        result.append(
            np.concatenate(documents).astype(np.int32)[np.argsort(np.concatenate(keys), kind="stable")]
        )
    return np.concatenate(result)


def held_out(lengths: Sequence[NDArray[np.int32]], documents: int, seed: int) -> NDArray[np.int32]:
    """The first `documents` documents of a split in the order of epoch 0, all of them where there are fewer; numbers over all parts."""
    return order([len(part) for part in lengths], seed, 0)[:documents]


def pack(lengths_D: NDArray[np.int32], sequence_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Put whole documents into sequences: (places_D, starts_N), sequence i holding documents `places_D[starts_N[i]:starts_N[i + 1]]`.

    Best fit, window by window: a document goes into the open sequence that it fills best; where none has room, the fullest is closed and a
    new one opened. Every window takes its k-th document at the same time, so the loop is over WINDOW places, not over documents.
    """
    windows = -(-len(lengths_D) // WINDOW)
    padded = np.zeros(windows * WINDOW, np.int32)
    padded[: len(lengths_D)] = lengths_D
    length_at = np.ascontiguousarray(padded.reshape(windows, WINDOW).T)
    every = np.arange(windows)
    room = np.zeros((OPEN, windows), np.int32)
    holds = np.full((OPEN, windows), -1, np.int16)  # which sequence of its window each open slot is
    opened = np.zeros(windows, np.int16)
    sequence_at = np.empty((WINDOW, windows), np.int16)
    for k in range(min(WINDOW, len(lengths_D))):
        left = room - length_at[k]
        slot = left.view(np.uint32).argmin(axis=0)  # as unsigned numbers the negatives, no room, come last
        new = left[slot, every] < 0
        slot = np.where(new, room.argmin(axis=0), slot)
        holds[slot, every] = np.where(new, opened, holds[slot, every])
        opened += new
        room[slot, every] = np.where(new, sequence_length, room[slot, every]) - length_at[k]
        sequence_at[k] = holds[slot, every]
    sequence_at[padded.reshape(windows, WINDOW).T == 0] = np.iinfo(
        np.int16
    ).max  # empty places at the end sort behind all documents
    by_window = np.ascontiguousarray(sequence_at.T)
    places_D = (np.argsort(by_window, axis=1, kind="stable") + every[:, None] * WINDOW).reshape(-1)[
        : len(lengths_D)
    ]
    first_sequence = np.concatenate([[0], np.cumsum(opened, dtype=np.int64)])
    sequence_D = (by_window + first_sequence[:-1, None]).reshape(-1)[places_D]
    return places_D, np.searchsorted(sequence_D, np.arange(first_sequence[-1] + 1))


def build(lengths: Sequence[NDArray[np.int32]], seed: int, epoch: int, sequence_length: int) -> Epoch:
    """Order and pack one epoch. `lengths[p]` are the lengths in tokens of part p's documents, in the part's order."""
    all_lengths_D = np.concatenate(lengths)
    visited_D = order([len(part) for part in lengths], seed, epoch)
    places_D, starts_N = pack(all_lengths_D[visited_D], sequence_length)
    documents_D = visited_D[places_D]
    ends = np.concatenate([[0], np.cumsum(all_lengths_D[documents_D], dtype=np.int64)])
    return Epoch(documents_D, starts_N, np.diff(ends[starts_N]))


def documents(
    numbers: NDArray[np.int32], first_document: NDArray[np.int64], lengths: Sequence[NDArray[np.int32]]
) -> list[PackedDocument]:
    """The documents of these numbers, which count over all parts; `first_document[p]` is part p's first."""
    parts = np.searchsorted(first_document, numbers, side="right") - 1
    return [
        PackedDocument(int(p), int(n), int(lengths[p][n]))
        for p, n in zip(parts, numbers - first_document[parts], strict=True)
    ]


class BatchPlan:
    """The endless stream of packed sequences that one (seed, sequence length) makes of a split, and where steps and ranks stand in it."""

    def __init__(self, lengths: Sequence[NDArray[np.int32]], seed: int, sequence_length: int) -> None:
        """Raises ValueError where there is no document at all, or one that no sequence can hold."""
        if not sum(len(part) for part in lengths):
            raise ValueError("there is no document in any part")
        longest = max(int(part.max()) for part in lengths if len(part))
        if longest > sequence_length:
            raise ValueError(
                f"a document of {longest} tokens does not fit into a sequence of {sequence_length}"
            )
        self.lengths = lengths
        self.seed = seed
        self.sequence_length = sequence_length
        self._first_document = firsts([len(part) for part in lengths])
        self._first_sequence = [0]  # of each epoch built so far, and of the one after it
        self._epochs: dict[int, Epoch] = {}  # the two used last: a step may straddle them

    def sequence(self, number: int) -> list[PackedDocument]:
        """The documents of sequence `number` of the stream, in the order in which they stand in it."""
        epoch, within = self.locate(number)
        plan = self._epoch(epoch)
        numbers = plan.documents_D[plan.starts_N[within] : plan.starts_N[within + 1]]
        return documents(numbers, self._first_document, self.lengths)

    def locate(self, number: int) -> tuple[int, int]:
        """(epoch, sequence within it) of sequence `number` of the stream."""
        while self._first_sequence[-1] <= number:
            self._epoch(len(self._first_sequence) - 1)
        epoch = int(np.searchsorted(self._first_sequence, number, side="right")) - 1
        return epoch, number - self._first_sequence[epoch]

    def steps(self, first: int, sequences_per_step: int, tokens: int) -> NDArray[np.int64]:
        """Tokens seen after each step of a stage that starts at sequence `first` and ends with the step that reaches `tokens`.

        Its length is the stage's number of steps, at least 1. Padding is not counted.
        """
        seen = np.zeros(0, np.int64)
        epoch, within = self.locate(first)
        ahead = np.zeros(0, np.int64)  # tokens of the sequences that do not make a whole step yet
        total = 0
        while True:
            ahead = np.concatenate([ahead, self._epoch(epoch).tokens_N[within:]])
            whole = len(ahead) // sequences_per_step * sequences_per_step
            after = total + np.cumsum(ahead[:whole].reshape(-1, sequences_per_step).sum(axis=1))
            enough = int(np.searchsorted(after, tokens))
            seen = np.concatenate([seen, after[: enough + 1]])
            if enough < len(after):
                return seen
            total, ahead, epoch, within = int(seen[-1]) if len(seen) else 0, ahead[whole:], epoch + 1, 0

    def _epoch(self, epoch: int) -> Epoch:
        if epoch not in self._epochs:
            self._epochs[epoch] = build(self.lengths, self.seed, epoch, self.sequence_length)
            if epoch == len(self._first_sequence) - 1:
                self._first_sequence.append(self._first_sequence[-1] + len(self._epochs[epoch].tokens_N))
        self._epochs[epoch] = plan = self._epochs.pop(epoch)
        for old in list(self._epochs)[:-2]:
            del self._epochs[old]
        return plan


def slice_of(rank: int, ranks: int, first: int, sequences_per_step: int, step: int) -> range:
    """The sequences of the stream that `rank` of `ranks` trains in step `step` (from 0) of a stage that starts at sequence `first`.

    The step as a whole is [first + step·S, first + (step + 1)·S) whatever the number of ranks, which must divide S.
    """
    each = sequences_per_step // ranks
    start = first + step * sequences_per_step + rank * each
    return range(start, start + each)
