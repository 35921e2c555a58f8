"""What each step of a stage trains on: which documents, on which rank, and how far that takes the data
streams."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.microbatch import Microbatch
from vpmoe.checkpoint.train_state import StepBatch, TrainState
from vpmoe.data.mixture import mix_streams
from vpmoe.data.reader import DatasetReader
from vpmoe.model.batch import Batch
from vpmoe.trainer.data.loader import Stream, plan_of
from vpmoe.trainer.data.scored_documents import ScoredDocuments


class StepPlan(Protocol):
    """The steps of one stage, on one rank. Steps count from 0."""

    @property
    def steps(self) -> int | None:
        """Number of steps; None if it is not known ahead."""

    @property
    def total(self) -> int:
        """Tokens after the last step, which the learning rate goes by."""

    def kind(self, step: int) -> str:
        """How a step trains: a name of api.stages.KINDS. Some kinds of stage have Vanilla steps too."""

    def batches(self, step: int) -> list[Batch]:
        """This rank's microbatches of a step."""

    def exercises(self, step: int) -> dict[str, float]:
        """Share of each exercise in the whole step, all ranks together, by tokens."""

    def describe(self, step: int) -> StepBatch:
        """What the whole step reads, all ranks together."""

    def advance(self, state: TrainState) -> TrainState:
        """The state with its data streams after the step at `state`; its counts of steps and tokens stay."""


class DatasetSteps:
    """A StepPlan of the training split, and of the documents with the teacher's scores if the stage uses
    them.

    Everything is a function of (seed, step) and of the data positions at which the stages before ended. The
    choice of the scored steps is in vpmoe/data/mixture.py.
    """

    def __init__(
        self,
        documents: DatasetReader,
        start: TrainState,
        *,
        kind: str,
        tokens: int,
        sequences_per_step: int,
        seed: int,
        sequence_length: int,
        rank: int,
        ranks: int,
        microbatch: Microbatch,
        scored: ScoredDocuments | None = None,
        scored_kind: str = "",
        scored_share: float = 0.0,
    ) -> None:
        """`start` is the stage's state, `kind` that of the steps on the training split.

        `scored_share` of the steps are on `scored` and are of `scored_kind`. Raises Permanent if there is
        nothing to train on.
        """
        self._each = sequences_per_step
        self._plan = plan_of(documents, seed, sequence_length)
        first = start.first_sequence
        alone: list[NDArray[np.int64]] = [
            self._plan.tokens_after_steps(first, self._each, tokens),
            np.zeros(0, np.int64),
        ]
        scored_plan, scored_first = None, 0
        if scored is not None:
            assert start.scored is not None
            scored_plan, scored_first = plan_of(scored, seed, sequence_length), start.scored.first_sequence
            alone[1] = scored_plan.tokens_after_steps(scored_first, self._each, tokens)
        self.mixture = mix_streams(alone[0], alone[1], scored_share if scored is not None else 0.0, tokens)
        self.steps = len(self.mixture.seen)
        self.total = int(self.mixture.seen[-1])
        plain, of_scored = self.mixture.steps_by_kind(self.steps)
        self._kinds = (kind, scored_kind)
        self._streams = [Stream(documents, self._plan, first, self._each, plain, rank, ranks, microbatch)]
        if scored is not None and scored_plan is not None:
            self._streams.append(
                Stream(
                    scored,
                    scored_plan,
                    scored_first,
                    self._each,
                    of_scored,
                    rank,
                    ranks,
                    microbatch,
                    scored.logp,
                )
            )

    def kind(self, step: int) -> str:
        """See StepPlan."""
        return self._kinds[self._number(step)]

    def batches(self, step: int) -> list[Batch]:
        """See StepPlan. Begins to fetch what the next steps need."""
        return self._streams[self._number(step)].batches(self.mixture.index_in_stream(step))

    def first_batch(self, step: int) -> Batch | None:
        """The first of this rank's microbatches of a step; None after the last step."""
        if step >= self.steps:
            return None
        return self._streams[self._number(step)].first_batch(self.mixture.index_in_stream(step))

    def exercises(self, step: int) -> dict[str, float]:
        """See StepPlan."""
        return self._streams[self._number(step)].exercises(self.mixture.index_in_stream(step))

    def describe(self, step: int) -> StepBatch:
        """See StepPlan."""
        return self._streams[self._number(step)].describe(self.mixture.index_in_stream(step))

    def advance(self, state: TrainState) -> TrainState:
        """See StepPlan."""
        plain, of_scored = self.mixture.steps_by_kind(state.steps + 1)
        next_sequence = state.first_sequence + plain * self._each
        scored = state.scored
        if scored is not None and len(self._streams) > 1:
            scored = scored.model_copy(
                update={"next_sequence": scored.first_sequence + of_scored * self._each}
            )
        return state.model_copy(
            update={
                "next_sequence": next_sequence,
                "epoch": self._plan.locate(next_sequence)[0],
                "scored": scored,
            }
        )

    def _number(self, step: int) -> int:
        """Of the step's stream: 0 is the training split, 1 the scored documents."""
        return int(self.mixture.scored[step])
