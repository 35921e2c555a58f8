"""The training split as this rank sees it: the batches of each step, with what they lie in fetched ahead."""

from vpmoe.failure import Permanent
from vpmoe.model.batch import Batch
from vpmoe.training.batch import microbatches, rows_each
from vpmoe.training.parts import Parts
from vpmoe.training.plan import BatchPlan, Document, slice_of

AHEAD = 32
"""Steps whose documents are fetched before they are wanted."""


class Stream:
    """Steps of one stage. Everything is a function of (seed, step); only the fetching has a memory."""

    def __init__(self, parts: Parts, plan: BatchPlan, first: int, sequences_per_step: int, steps: int, rank: int, ranks: int) -> None:
        """`first`: the sequence that the stage begins with; `steps`: how many it has."""
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
            self._parts.prefetch(document for row in self._rows(ahead, self._rank, self._ranks) for document in row)
            self._fetched = ahead
        return microbatches(self._rows(step, self._rank, self._ranks), self._parts.read, self._plan.sequence_length)

    def first(self, step: int) -> Batch | None:
        """The first of this rank's microbatches of a step; None after the last step."""
        if step >= self._steps:
            return None
        rows = self._rows(step, self._rank, self._ranks)[: rows_each(self._plan.sequence_length)]
        return microbatches(rows, self._parts.read, self._plan.sequence_length)[0]

    def exercises(self, step: int) -> dict[str, float]:
        """Share of each exercise in the whole step, all ranks together, by tokens."""
        return self._parts.exercise_shares(document for row in self._rows(step, 0, 1) for document in row)

    def _rows(self, step: int, rank: int, ranks: int) -> list[list[Document]]:
        return [self._plan.sequence(number) for number in slice_of(rank, ranks, self._first, self._sequences_per_step, step)]


def plan_of(parts: Parts, seed: int, sequence_length: int) -> BatchPlan:
    """The batch plan of the training split. Raises Permanent where there is nothing to train on."""
    try:
        return BatchPlan(parts.lengths, seed, sequence_length)
    except ValueError as error:
        raise Permanent(
            f"the data set's train split cannot be trained on: {error}. Look at the counts in its manifest; dataset.source, sampling, "
            "maxLength and validFraction decide what is in it."
        ) from error
