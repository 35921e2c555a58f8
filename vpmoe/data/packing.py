"""Order and packing of documents: which documents make up step n of a data stream, on which rank.

A pure function of the parts' document lengths, the seed and the sequence length. So a resumed run needs no
data state, ranks agree without communication, and each rank knows what to fetch next. The stream is the
sequences of epoch 0, then those of epoch 1, and so on. A step takes the next S sequences and may span two
epochs. Documents are read in reader.py; tensors are built in vpmoe.trainer.data.collate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

INTERLEAVED_PARTS = 32
"""Minimum number of parts that are read at the same time (or all, if there are fewer): a shard often holds
one exercise only."""
SHUFFLE_DISTANCE = 1024
"""Documents by which one may move from its place in its part: enough to mix differently each epoch, few
enough for long reads."""
PACKING_WINDOW = 1024
"""Documents that are packed together. Windows are independent of each other and are packed in parallel."""
OPEN_SEQUENCES = 8
"""Sequences of a window that are open at the same time. With SYNTH's lengths, 1.2 % of the positions stay
empty (with 1: 11 %)."""


class PackedDocument(NamedTuple):
    """One document of the dataset."""

    part: int
    number: int
    """Index in the part."""
    length: int
    """Tokens."""


@dataclass(frozen=True)
class Epoch:
    """One pass over every document: sequence i holds documents `documents_D[starts_N[i]:starts_N[i + 1]]`."""

    documents_D: NDArray[np.int32]
    """Document numbers, counted over all parts."""
    starts_N: NDArray[np.int64]
    """[sequences + 1]"""
    tokens_N: NDArray[np.int64]
    """Tokens in each sequence, excluding padding."""


def first_documents(documents_in_part: Sequence[int]) -> NDArray[np.int64]:
    """[parts + 1] The number of the first document of each part; the last entry is the number of all
    documents."""
    return np.concatenate([[0], np.cumsum(documents_in_part, dtype=np.int64)])


def epoch_order(documents_in_part: Sequence[int], seed: int, epoch: int) -> NDArray[np.int32]:
    """The order in which an epoch visits all documents, each exactly once.

    Parts are split at random into groups of INTERLEAVED_PARTS to 2·INTERLEAVED_PARTS − 1; groups are read one
    after another. In a group, documents are sorted by their relative position in their part, shifted at
    random by up to SHUFFLE_DISTANCE documents. So all parts of a group are read at an even pace, each from a
    random start and cyclically, and the reads are long ranges.
    """
    random = np.random.default_rng([seed, epoch])
    first_document = first_documents(documents_in_part)
    parts = random.permutation(np.flatnonzero(np.asarray(documents_in_part)))
    result = []
    for group in np.array_split(parts, max(1, len(parts) // INTERLEAVED_PARTS)):
        keys, documents = [], []
        for part in group:
            n = int(documents_in_part[part])
            near = min(n, SHUFFLE_DISTANCE)
            start = random.integers(n)
            documents.append(first_document[part] + np.roll(np.arange(n, dtype=np.int32), -start))
            keys.append((np.arange(n) + random.random(n) * near) / (n + near))
        # Stable, so that the order of equal keys does not depend on the processor's vector instructions.
        result.append(
            np.concatenate(documents).astype(np.int32)[np.argsort(np.concatenate(keys), kind="stable")]
        )
    return np.concatenate(result)


def held_out_documents(lengths: Sequence[NDArray[np.int32]], documents: int, seed: int) -> NDArray[np.int32]:
    """The numbers (over all parts) of the first `documents` documents in the order of epoch 0, or of all if
    there are fewer."""
    return epoch_order([len(part) for part in lengths], seed, 0)[:documents]


def pack_sequences(
    lengths_D: NDArray[np.int32], sequence_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack whole documents into sequences: (places_D, starts_N); sequence i holds documents
    `places_D[starts_N[i]:starts_N[i + 1]]`.

    Best fit in each window: a document goes into the open sequence with the least room that holds it; if none
    does, the fullest is closed and a new one opened. All windows place their k-th document at the same time,
    so the loop has PACKING_WINDOW iterations.
    """
    windows = -(-len(lengths_D) // PACKING_WINDOW)
    padded = np.zeros(windows * PACKING_WINDOW, np.int32)
    padded[: len(lengths_D)] = lengths_D
    length_at = np.ascontiguousarray(padded.reshape(windows, PACKING_WINDOW).T)
    every = np.arange(windows)
    room = np.zeros((OPEN_SEQUENCES, windows), np.int32)
    holds = np.full(
        (OPEN_SEQUENCES, windows), -1, np.int16
    )  # sequence number, within its window, in each open slot
    opened = np.zeros(windows, np.int16)
    sequence_at = np.empty((PACKING_WINDOW, windows), np.int16)
    for k in range(min(PACKING_WINDOW, len(lengths_D))):
        left = room - length_at[k]
        slot = left.view(np.uint32).argmin(axis=0)  # as unsigned numbers, negatives (no room) sort last
        new = left[slot, every] < 0
        slot = np.where(new, room.argmin(axis=0), slot)
        holds[slot, every] = np.where(new, opened, holds[slot, every])
        opened += new
        room[slot, every] = np.where(new, sequence_length, room[slot, every]) - length_at[k]
        sequence_at[k] = holds[slot, every]
    # Empty places at the end sort after all documents.
    sequence_at[padded.reshape(windows, PACKING_WINDOW).T == 0] = np.iinfo(np.int16).max
    by_window = np.ascontiguousarray(sequence_at.T)
    places_D = (np.argsort(by_window, axis=1, kind="stable") + every[:, None] * PACKING_WINDOW).reshape(-1)[
        : len(lengths_D)
    ]
    first_sequence = np.concatenate([[0], np.cumsum(opened, dtype=np.int64)])
    sequence_D = (by_window + first_sequence[:-1, None]).reshape(-1)[places_D]
    return places_D, np.searchsorted(sequence_D, np.arange(first_sequence[-1] + 1))


def build_epoch(lengths: Sequence[NDArray[np.int32]], seed: int, epoch: int, sequence_length: int) -> Epoch:
    """Order and pack one epoch. `lengths[p]` holds the length in tokens of each document of part p, in the
    part's order."""
    all_lengths_D = np.concatenate(lengths)
    visited_D = epoch_order([len(part) for part in lengths], seed, epoch)
    places_D, starts_N = pack_sequences(all_lengths_D[visited_D], sequence_length)
    documents_D = visited_D[places_D]
    ends = np.concatenate([[0], np.cumsum(all_lengths_D[documents_D], dtype=np.int64)])
    return Epoch(documents_D, starts_N, np.diff(ends[starts_N]))


def packed_documents(
    numbers: NDArray[np.int32], first_document: NDArray[np.int64], lengths: Sequence[NDArray[np.int32]]
) -> list[PackedDocument]:
    """The documents with these numbers (over all parts). `first_document` is the result of
    `first_documents`."""
    parts = np.searchsorted(first_document, numbers, side="right") - 1
    return [
        PackedDocument(int(p), int(n), int(lengths[p][n]))
        for p, n in zip(parts, numbers - first_document[parts], strict=True)
    ]


class SequenceStream:
    """The endless stream of packed sequences of one split for one (seed, sequence length). Epochs are built
    on demand."""

    def __init__(self, lengths: Sequence[NDArray[np.int32]], seed: int, sequence_length: int) -> None:
        """Raises ValueError if there is no document, or one that is longer than a sequence."""
        if not sum(len(part) for part in lengths):
            raise ValueError("no part has any document")
        longest = max(int(part.max()) for part in lengths if len(part))
        if longest > sequence_length:
            raise ValueError(
                f"a document of {longest} tokens does not fit into a sequence of {sequence_length}"
            )
        self.lengths = lengths
        self.seed = seed
        self.sequence_length = sequence_length
        self._first_document = first_documents([len(part) for part in lengths])
        self._first_sequence = [0]  # of each epoch built so far and of the next one
        self._epochs: dict[int, Epoch] = {}  # the two used last: a step may span them

    def sequence(self, number: int) -> list[PackedDocument]:
        """The documents of sequence `number` of the stream, in order."""
        epoch, within = self.locate(number)
        plan = self._epoch(epoch)
        numbers = plan.documents_D[plan.starts_N[within] : plan.starts_N[within + 1]]
        return packed_documents(numbers, self._first_document, self.lengths)

    def locate(self, number: int) -> tuple[int, int]:
        """(epoch, sequence within it) of sequence `number` of the stream."""
        while self._first_sequence[-1] <= number:
            self._epoch(len(self._first_sequence) - 1)
        epoch = int(np.searchsorted(self._first_sequence, number, side="right")) - 1
        return epoch, number - self._first_sequence[epoch]

    def tokens_after_steps(self, first: int, sequences_per_step: int, tokens: int) -> NDArray[np.int64]:
        """Tokens after each step of a stage that starts at sequence `first` and ends with the step that
        reaches `tokens`.

        [steps], at least 1. Padding is not counted.
        """
        seen = np.zeros(0, np.int64)
        epoch, within = self.locate(first)
        ahead = np.zeros(0, np.int64)  # tokens of sequences that do not fill a step yet
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
            self._epochs[epoch] = build_epoch(self.lengths, self.seed, epoch, self.sequence_length)
            if epoch == len(self._first_sequence) - 1:
                self._first_sequence.append(self._first_sequence[-1] + len(self._epochs[epoch].tokens_N))
        self._epochs[epoch] = plan = self._epochs.pop(epoch)
        for old in list(self._epochs)[:-2]:
            del self._epochs[old]
        return plan


def rank_sequences(rank: int, ranks: int, first: int, sequences_per_step: int, step: int) -> range:
    """The sequences that `rank` of `ranks` trains in step `step` (from 0) of a stage that starts at sequence
    `first`.

    All ranks together train [first + step·S, first + (step + 1)·S), for any number of ranks that divides S.
    """
    each = sequences_per_step // ranks
    start = first + step * sequences_per_step + rank * each
    return range(start, start + each)
