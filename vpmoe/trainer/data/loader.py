"""Documents as this rank trains on them: the batches of each step of one stream, with what they lie in fetched ahead."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vpmoe.data.packing import BatchPlan, PackedDocument, slice_of
from vpmoe.failure import Permanent
from vpmoe.model.batch import Batch
from vpmoe.trainer.data.collate import Logp, microbatches, rows_each

AHEAD = 32
"""Steps whose documents are fetched before they are wanted."""


class Documents(Protocol):
    """What a stream is of: Parts, or ScoredParts."""

    lengths: Sequence[NDArray[np.int32]]

    def read(self, document: PackedDocument) -> tuple[NDArray[np.int32], NDArray[np.uint8]]: ...
    def prefetch(self, documents: Iterable[PackedDocument]) -> None: ...
    def exercise_shares(self, documents: Iterable[PackedDocument]) -> dict[str, float]: ...


class Stream:
    """Steps of one stage. Everything is a function of (seed, step); only the fetching has a memory."""

    def __init__(
        self,
        parts: Documents,
        plan: BatchPlan,
        first: int,
        sequences_per_step: int,
        steps: int,
        rank: int,
        ranks: int,
        logp: Logp | None = None,
    ) -> None:
        """`first`: the sequence that the stage begins with; `steps`: how many it has of this stream; `logp`: the teacher's scores."""
        self._logp = logp
        self._parts = parts
        self._plan = plan
        self._first = first
        self._sequences_per_step = sequences_per_step
        self._steps = steps
        self._rank, self._ranks = rank, ranks
        self._fetched = -1

    def batches(self, step: int) -> list[Batch]:
        """This rank's microbatches of a step (from 0). Begins to fetch what the next steps need."""
        for ahead in range(max(step, self._fetched + 1), min(step + AHEAD + 1, self._steps)):
            self._parts.prefetch(
                document for row in self._rows(ahead, self._rank, self._ranks) for document in row
            )
            self._fetched = ahead
        return microbatches(
            self._rows(step, self._rank, self._ranks),
            self._parts.read,
            self._plan.sequence_length,
            self._logp,
        )

    def first(self, step: int) -> Batch | None:
        """The first of this rank's microbatches of a step; None after the last step."""
        if step >= self._steps:
            return None
        rows = self._rows(step, self._rank, self._ranks)[: rows_each(self._plan.sequence_length)]
        return microbatches(rows, self._parts.read, self._plan.sequence_length, self._logp)[0]

    def exercises(self, step: int) -> dict[str, float]:
        """Share of each exercise in the whole step, all ranks together, by tokens."""
        return self._parts.exercise_shares(document for row in self._rows(step, 0, 1) for document in row)

    def _rows(self, step: int, rank: int, ranks: int) -> list[list[PackedDocument]]:
        return [
            self._plan.sequence(number)
            for number in slice_of(rank, ranks, self._first, self._sequences_per_step, step)
        ]


def plan_of(parts: Documents, seed: int, sequence_length: int) -> BatchPlan:
    """The batch plan of some of the training split. Raises Permanent where there is nothing to train on."""
    try:
        return BatchPlan(parts.lengths, seed, sequence_length)
    except ValueError as error:
        raise Permanent(
            f"the data set's train split cannot be trained on: {error}. Look at the counts in its manifest; dataset.source, sampling, "
            "maxLength and validFraction decide what is in it."
        ) from error
