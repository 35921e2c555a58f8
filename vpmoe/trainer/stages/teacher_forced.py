"""A TeacherForced stage: towards the distribution of a teacher that runs beside the students, in processes of
its own."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from vpmoe.api import pod_metrics
from vpmoe.api.metrics import Measures, Sample
from vpmoe.api.stages import TeacherForced
from vpmoe.checkpoint.train_state import TrainState
from vpmoe.data.reader import DatasetReader
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.model.objective import Objective
from vpmoe.model.shapes import SHAPES
from vpmoe.objectives.teacher_forced import teacher_forced
from vpmoe.storage.manifest import Input
from vpmoe.trainer import stage_inputs
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.stages.stage_kind import StageKind
from vpmoe.trainer.teacher_forced.client import connect

log = logging.getLogger(__name__)


class TeacherWait(Measures):
    """Whether the teacher keeps up with the students, on rank 0."""

    teacher_wait_seconds: float
    """Seconds of the step in which the student's device had nothing to do but wait for the teacher."""
    student_busy: float
    """Share of the step's time in which it had."""

    def samples(self) -> Iterable[Sample]:
        return [Sample(pod_metrics.WAIT_SECONDS, self.teacher_wait_seconds, {"reason": "teacher"})]


class TeacherForcedStage(StageKind):
    """See StageKind."""

    def __init__(
        self, context: StageContext, stage: TeacherForced, documents: DatasetReader, device: torch.device
    ) -> None:
        """Connects to the teacher. Raises Terminated if the process is asked to stop while it waits for
        the teacher."""
        super().__init__(context, documents)
        self._stage = stage
        self._began = 0.0
        """When the step began."""
        self._waited = self._trained = 0.0
        """Seconds of this attempt's steps: waiting for the teacher, and all."""
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
        self._began = time.monotonic()
        self._teacher.meter.reset()
        batches = self._steps.batches(state.steps)
        self._teacher.announce(batches, self._steps.first_batch(state.steps + 1))
        return batches

    def objective(self, step: int, counts: Tensor) -> Objective:
        return teacher_forced(
            counts, self.span_weights, self._stage.loss, self._output_VG, self._teacher.hidden_of
        )

    def step_metrics(self) -> TeacherWait:
        waited, seconds = self._teacher.meter.seconds(), time.monotonic() - self._began
        return TeacherWait(teacher_wait_seconds=waited, student_busy=1 - min(waited / seconds, 1.0))

    def after_step(self, learner: Learner, state: TrainState, seconds: float) -> None:
        self._waited += self._teacher.meter.seconds()
        self._trained += seconds

    def stop(self) -> None:
        """Disconnects from the teacher, whose process then exits."""
        if self._trained:
            log.info(
                "The student was busy for %.1f %% of %.0f s of training, else it waited for the teacher",
                100 * (1 - min(self._waited / self._trained, 1.0)),
                self._trained,
            )
        self._teacher.disconnect()
