"""What each step of a stage trains on: which documents, on which rank, and where that leaves the data.

A stage reads one stream, the whole training split; a Rescored one reads a second, the documents that the teacher has scored, in the steps
that mixture.py gives it. Everything is a function of (seed, step) and of where the stages before ended.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpmoe.checkpoint.train_state import TrainState
from vpmoe.data.mixture import mix
from vpmoe.data.reader import DatasetReader
from vpmoe.model.batch import Batch
from vpmoe.trainer.data.loader import Stream, plan_of
from vpmoe.trainer.data.scored_documents import ScoredDocuments


class StepPlan:
    """The steps of one stage, on one rank."""

    def __init__(
        self,
        parts: DatasetReader,
        scored: ScoredDocuments | None,
        start: TrainState,
        *,
        kind: str,
        share: float,
        tokens: int,
        sequences_per_step: int,
        seed: int,
        sequence_length: int,
        rank: int,
        ranks: int,
    ) -> None:
        """`kind` is the stage's. `share` of the steps are of the scored documents, from where `start` says that the stage
        began. Raises Permanent where there is nothing to train on."""
        self._kind = kind
        self._each = sequences_per_step
        self.plan = plan_of(parts, seed, sequence_length)
        first = start.first_sequence
        alone: list[NDArray[np.int64]] = [self.plan.steps(first, self._each, tokens), np.zeros(0, np.int64)]
        plan, scored_first = None, 0
        if scored is not None:
            assert start.scored is not None
            plan, scored_first = plan_of(scored, seed, sequence_length), start.scored.first_sequence
            alone[1] = plan.steps(scored_first, self._each, tokens)
        self.mixture = mix(alone[0], alone[1], share if scored is not None else 0.0, tokens)
        self.seen = self.mixture.seen
        """[steps] tokens of the stage after each of its steps."""
        self.steps = len(self.seen)
        self.total = int(self.seen[-1])
        """Tokens by which the learning rate goes: those of the last step."""
        plain, of_scored = self.mixture.turns(len(self.seen))
        self._streams = [Stream(parts, self.plan, first, self._each, plain, rank, ranks)]
        if scored is not None and plan is not None:
            self._streams.append(
                Stream(scored, plan, scored_first, self._each, of_scored, rank, ranks, scored.logp)
            )

    def batches(self, step: int) -> list[Batch]:
        """This rank's microbatches of a step (from 0)."""
        return self._stream(step).batches(self.mixture.turn(step))

    def first(self, step: int) -> Batch | None:
        """The first of this rank's microbatches of a step; None after the last step."""
        return self._stream(step).first(self.mixture.turn(step)) if step < len(self.seen) else None

    def kind(self, step: int) -> str:
        """How a step trains; those of a Rescored stage that are not of the scored documents are Vanilla."""
        return self._kind if self._kind != "Rescored" or self.mixture.scored[step] else "Vanilla"

    def exercises(self, step: int) -> dict[str, float]:
        """Share of each exercise in the whole step, all ranks together, by tokens."""
        return self._stream(step).exercises(self.mixture.turn(step))

    def after(self, position: TrainState) -> dict[str, Any]:
        """What of the position says where the data stand, once the step at `position` is done."""
        plain, of_scored = self.mixture.turns(position.steps + 1)
        ahead = position.first_sequence + plain * self._each
        scored = position.scored
        if scored is not None and len(self._streams) > 1:
            scored = scored.model_copy(
                update={"next_sequence": scored.first_sequence + of_scored * self._each}
            )
        return {"next_sequence": ahead, "epoch": self.plan.locate(ahead)[0], "scored": scored}

    def _stream(self, step: int) -> Stream:
        return self._streams[int(self.mixture.scored[step])]
