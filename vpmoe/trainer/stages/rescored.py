"""A Rescored stage: some steps on documents that the teacher has scored, their tokens weighted by its
confidence; the others Vanilla."""

import logging
from collections.abc import Sequence

from torch import Tensor

from vpmoe.api.stages import Rescored
from vpmoe.checkpoint.train_state import ConfidenceCentre, ScoredStream, TrainState
from vpmoe.data.reader import BlockCache, DatasetReader
from vpmoe.data.spans import SPANS
from vpmoe.failure import Permanent
from vpmoe.model.objective import Objective
from vpmoe.objectives.confidence import centre
from vpmoe.objectives.rescored import rescored
from vpmoe.objectives.vanilla import vanilla
from vpmoe.storage.manifest import Input
from vpmoe.trainer import stage_inputs
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.data.scored_documents import ScoredDocuments
from vpmoe.trainer.stages.stage_kind import StageKind

log = logging.getLogger(__name__)


class RescoredStage(StageKind):
    """See StageKind. If `mix` is 0 there are no scores, and all steps are Vanilla."""

    def __init__(
        self, context: StageContext, stage: Rescored, documents: DatasetReader, cache: BlockCache
    ) -> None:
        super().__init__(context, documents)
        self._stage = stage
        self._scored = ScoredDocuments(documents, context.scores, cache) if context.scores else None

    def check_resumed(self, state: TrainState) -> None:
        """The stage continues with the scores that it began with."""
        scores = self.context.scores.facts["id"] if self.context.scores else None
        began = state.scored.scores if state.scored else None
        if scores is not None and scores != began:
            raise Permanent(
                f"stage {self._stage.name} began with the teacher's scores {began}, but would continue with "
                f"{scores}: the code that makes scores has changed. Continue with the image that the stage "
                "began with, or start a new run."
            )

    def first_state(self, state: TrainState) -> TrainState:
        """Fixes where the stage begins among the scored documents, and the centre of its confidence
        weights."""
        if self.context.scores is None:
            return state
        facts, before = self.context.scores.facts, state.scored
        first = before.next_sequence if before is not None and before.scores == facts["id"] else 0
        centres = {span: centre(facts["histogram"][span], self._stage.confidence) for span in SPANS}
        log.info("A token's confidence weight is 1 where the teacher's log-probability is %s", centres)
        scored = ScoredStream(scores=facts["id"], first_sequence=first, next_sequence=first)
        return state.model_copy(update={"scored": scored, "objective": ConfidenceCentre(**centres)})

    def inputs(self) -> list[Input]:
        scores = self.context.scores
        return [stage_inputs.scores_input(self.context.bucket, scores)] if scores else []

    def prepare(self, state: TrainState, inputs: Sequence[Input]) -> None:
        self.plan = self.dataset_steps(state, "Vanilla", self._scored, "Rescored", self._stage.mix)
        self._centre = state.objective

    def objective(self, step: int, counts: Tensor) -> Objective:
        if self.plan.kind(step) == "Vanilla":
            return vanilla(counts, self.span_weights)
        assert self._centre is not None
        return rescored(counts, self.span_weights, self._stage.confidence, self._centre.model_dump())
