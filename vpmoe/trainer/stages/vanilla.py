"""A Vanilla stage: next-token training on the dataset."""

from collections.abc import Sequence

from torch import Tensor

from vpmoe.checkpoint.train_state import TrainState
from vpmoe.model.objective import Objective
from vpmoe.objectives.vanilla import vanilla
from vpmoe.storage.manifest import Input
from vpmoe.trainer.stages.stage_kind import StageKind


class VanillaStage(StageKind):
    """See StageKind."""

    def prepare(self, state: TrainState, inputs: Sequence[Input]) -> None:
        self.plan = self.dataset_steps(state, "Vanilla")

    def objective(self, step: int, counts: Tensor) -> Objective:
        return vanilla(counts, self.span_weights)
