"""Loads this rank's batches of the steps of one stream, and fetches ahead what the next steps need."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.microbatch import Microbatch
from vpmoe.checkpoint.train_state import StepBatch
from vpmoe.data.packing import PackedDocument, SequenceStream, rank_sequences
from vpmoe.failure import Permanent
from vpmoe.model.batch import Batch
from vpmoe.trainer.data.collate import LogpOf, microbatches

AHEAD = 32
"""Steps whose documents are fetched before they are needed."""


class Documents(Protocol):
    """What a stream reads: DatasetReader or ScoredDocuments."""

    lengths: Sequence[NDArray[np.int32]]

    def read_document(self, document: PackedDocument) -> tuple[NDArray[np.int32], NDArray[np.uint8]]: ...
    def prefetch(self, documents: Iterable[PackedDocument]) -> None: ...
    def exercise_shares(self, documents: Iterable[PackedDocument]) -> dict[str, float]: ...
    def numbers_by_part(self, documents: Iterable[PackedDocument]) -> dict[str, tuple[int, ...]]: ...


class Stream:
    """The steps of one stage on one stream. Batches are a function of (seed, step); only fetching keeps
    state."""

    def __init__(
        self,
        documents: Documents,
        plan: SequenceStream,
        first: int,
        sequences_per_step: int,
        steps: int,
        rank: int,
        ranks: int,
        microbatch: Microbatch,
        teacher_logp: LogpOf | None = None,
    ) -> None:
        """`first`: the sequence that the stage begins with; `steps`: the stage's steps on this stream;
        `teacher_logp`: the scores."""
        self._documents = documents
        self._plan = plan
        self._first = first
        self._sequences_per_step = sequences_per_step
        self._steps = steps
        self._rank, self._ranks = rank, ranks
        self._microbatch = microbatch
        self._teacher_logp = teacher_logp
        self._fetched = -1

    def batches(self, step: int) -> list[Batch]:
        """This rank's microbatches of a step (from 0). Begins to fetch what the next steps need."""
        for ahead in range(max(step, self._fetched + 1), min(step + AHEAD + 1, self._steps)):
            rows = self._rows(ahead, self._rank, self._ranks)
            self._documents.prefetch(document for row in rows for document in row)
            self._fetched = ahead
        return self._microbatches(self._rows(step, self._rank, self._ranks))

    def first_batch(self, step: int) -> Batch | None:
        """The first of this rank's microbatches of a step; None after the last step."""
        if step >= self._steps:
            return None
        rows = self._rows(step, self._rank, self._ranks)
        first = self._microbatch.sizes(len(rows), self._plan.sequence_length)[0]
        return self._microbatches(rows[:first])[0]

    def exercises(self, step: int) -> dict[str, float]:
        """Share of each exercise in the whole step, all ranks together, by tokens."""
        rows = self._rows(step, 0, 1)
        return self._documents.exercise_shares(document for row in rows for document in row)

    def describe(self, step: int) -> StepBatch:
        """What the whole step reads, all ranks together."""
        rows = self._rows(step, 0, 1)
        return StepBatch(
            documents=self._documents.numbers_by_part(document for row in rows for document in row),
            first_sequence=self._first + step * self._sequences_per_step,
            sequences=len(rows),
        )

    def _microbatches(self, rows: Sequence[Sequence[PackedDocument]]) -> list[Batch]:
        return microbatches(
            rows,
            self._documents.read_document,
            self._plan.sequence_length,
            self._microbatch,
            self._teacher_logp,
        )

    def _rows(self, step: int, rank: int, ranks: int) -> list[list[PackedDocument]]:
        return [
            self._plan.sequence(number)
            for number in rank_sequences(rank, ranks, self._first, self._sequences_per_step, step)
        ]


def plan_of(documents: Documents, seed: int, sequence_length: int) -> SequenceStream:
    """The batch plan of these documents. Raises Permanent if there is nothing to train on."""
    try:
        return SequenceStream(documents.lengths, seed, sequence_length)
    except ValueError as error:
        raise Permanent(
            f"the dataset's train split cannot be trained on: {error}. Look at the counts in its manifest; "
            "dataset.source, sampling, maxLength and validFraction decide what is in it."
        ) from error
