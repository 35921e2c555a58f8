"""A TeacherForced stage: towards the distribution of a teacher that runs beside the students, in a process of
its own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vpmoe.api.stages import TeacherForced
from vpmoe.checkpoint.train_state import TrainState
from vpmoe.data.reader import DatasetReader
from vpmoe.model.batch import Batch
from vpmoe.model.objective import Objective
from vpmoe.model.shapes import SHAPES
from vpmoe.objectives.teacher_forced import teacher_forced
from vpmoe.storage.manifest import Input
from vpmoe.trainer import stage_inputs
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.stages.stage_kind import StageKind
from vpmoe.trainer.teacher_forced.client import connect


class TeacherForcedStage(StageKind):
    """See StageKind."""

    def __init__(
        self, context: StageContext, stage: TeacherForced, documents: DatasetReader, device: torch.device
    ) -> None:
        """Connects to the teacher. Raises Terminated if the process is asked to stop while it waits for
        the teacher."""
        super().__init__(context, documents)
        self._stage = stage
        self._teacher = connect(context, device)
        self.teacher_width = self._teacher.width

    def inputs(self) -> list[Input]:
        return [stage_inputs.teacher_input(self.context.run, self.context.bucket)]

    def prepare(self, state: TrainState, inputs: Sequence[Input]) -> None:
        self.plan = self._steps = self.dataset_steps(state, "TeacherForced")
        self._output_VG = self._teacher.output(SHAPES[self.context.run.spec.student.shape].vocabulary)

    def batches(self, state: TrainState, waiting: Callable[[str], None]) -> list[Batch]:
        """Announces them to the teacher, with the first of the next step: the teacher works one microbatch
        ahead."""
        batches = self._steps.batches(state.steps)
        self._teacher.announce(batches, self._steps.first_batch(state.steps + 1))
        return batches

    def objective(self, step: int, counts: Tensor) -> Objective:
        return teacher_forced(
            counts, self.span_weights, self._stage.loss, self._output_VG, self._teacher.hidden_of
        )

    def stop(self) -> None:
        """Disconnects from the teacher, whose process then exits."""
        self._teacher.disconnect()
