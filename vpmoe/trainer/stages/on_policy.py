"""An OnPolicy stage: on windows of the student's own samples, which the teacher has scored, with Vanilla
anchor steps between them."""

import logging
from collections.abc import Callable, Sequence

from torch import Tensor

from vpmoe.api.metrics import Measures
from vpmoe.api.progress import ProgressCondition
from vpmoe.api.stages import OnPolicy, Stop
from vpmoe.checkpoint.train_state import TrainState, WindowStream
from vpmoe.data import canary
from vpmoe.data.reader import DatasetReader
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner, Outcome
from vpmoe.model.objective import Objective
from vpmoe.model.spans import weighted_sum
from vpmoe.objectives.onpolicy import OnPolicyMeasures, on_policy
from vpmoe.objectives.vanilla import vanilla
from vpmoe.storage.manifest import Input
from vpmoe.trainer import stage_inputs
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.data.canary_windows import CanaryWindows
from vpmoe.trainer.onpolicy import window_stats
from vpmoe.trainer.onpolicy.coordinator import OnPolicyCoordinator
from vpmoe.trainer.onpolicy.publisher import Publisher, probe_sequences
from vpmoe.trainer.onpolicy.window_metrics import FirstWindow
from vpmoe.trainer.stages.stage_kind import StageEvaluation, StageKind, StepLoss

log = logging.getLogger(__name__)


class OnPolicyStage(StageKind):
    """See StageKind. The window that is being trained is the coordinator's."""

    publisher: Publisher | None = None
    """Set by `prepare`, as is the coordinator."""

    def __init__(self, context: StageContext, stage: OnPolicy, documents: DatasetReader) -> None:
        super().__init__(context, documents)
        self._stage = stage

    def first_state(self, state: TrainState) -> TrainState:
        """Fixes the first prompt: the one after the last of the OnPolicy stages before."""
        first = state.windows.next_prompt if state.windows else 0
        return state.model_copy(update={"windows": WindowStream(first_prompt=first, next_prompt=first)})

    def inputs(self) -> list[Input]:
        return [stage_inputs.teacher_input(self.context.run, self.context.bucket)]

    def prepare(self, state: TrainState, inputs: Sequence[Input]) -> None:
        self.publisher = Publisher(self.context, inputs, probe_sequences(self.documents))
        self.plan = self.coordinator = OnPolicyCoordinator(
            self.context,
            self._stage,
            self.documents,
            state,
            self.publisher,
            sequences_per_step=self.sequences_per_step,
            microbatch=self.microbatch,
        )
        texts = canary.load_texts(self.context.run.spec.evaluation.canary, self.context.bucket)
        length = self.context.run.spec.training.sequence_length
        self._canary = CanaryWindows(texts, length, self.microbatch)

    def begin(self, learner: Learner, state: TrainState) -> None:
        """Publishes version 0, which the sampler waits for."""
        self.coordinator.publish_due(learner, state)

    def start_metrics(self, state: TrainState) -> Measures | None:
        stream = state.windows
        return FirstWindow(windows=stream.trained, first_prompt=stream.first_prompt) if stream else None

    def batches(self, state: TrainState, waiting: Callable[[str], None]) -> list[Batch] | None:
        """Waits for the step's window."""
        if not self.coordinator.load_window(state, waiting):
            return None
        return self.coordinator.batches(state.steps)

    def objective(self, step: int, counts: Tensor) -> Objective:
        if self.plan.kind(step) == "Vanilla":
            return vanilla(counts, self.span_weights)
        return on_policy(counts, self.span_weights)

    def check_step(self, state: TrainState, outcome: Outcome) -> TrainState:
        """Raises Permanent if the sampler has computed another student than the trainer for too long."""
        return self.coordinator.record_window(state, outcome)

    def step_loss(self, step: int, outcome: Outcome) -> StepLoss:
        """The window's reverse KL with spans weighted, in nats a token. The step minimises a surrogate, of
        which only the gradient means something."""
        if self.plan.kind(step) == "Vanilla":
            return super().step_loss(step, outcome)._replace(name="anchor loss", reported=False)
        assert isinstance(outcome.measures, OnPolicyMeasures)
        return StepLoss("reverse KL", weighted_sum(outcome.measures.reverse_kl, self.span_weights))

    def after_step(self, learner: Learner, state: TrainState, seconds: float) -> None:
        """Publishes the version that is due, before an anchor step moves the weights."""
        self.coordinator.add_seconds(seconds)
        self.coordinator.publish_due(learner, state)

    def step_metrics(self) -> Measures | None:
        return self.coordinator.metrics()

    def evaluate(self, learner: Learner, state: TrainState) -> StageEvaluation:
        """Measures the canary, which shows what a student loses that learns from its own samples alone, and
        closes the sums over the windows since the evaluation before."""
        found = self._canary.measure(learner)
        log.info("Canary after %d steps: %.4f bits per byte", state.steps, found.bits_per_byte)
        state = self.coordinator.evaluate(state, self.span_weights)
        return StageEvaluation(state, window_stats.evaluation_of(state.windows, found))

    def ends_early(self, state: TrainState, stop: Stop) -> bool:
        """By the reverse KL in place of the held-out loss, and only if enough of the latest rollouts are
        valid."""
        return window_stats.ends_early(state.windows, stop)

    def before_checkpoint(self) -> None:
        """Waits for the version that is being uploaded: a resumed attempt could not make it."""
        assert self.publisher is not None
        self.publisher.wait()

    def conditions(self) -> list[ProgressCondition]:
        return self.coordinator.conditions()

    def check(self) -> None:
        assert self.publisher is not None
        self.publisher.check()

    def finish(self, state: TrainState) -> None:
        self.coordinator.finish(early=state.tokens < self._stage.tokens)

    def close(self) -> None:
        if self.publisher is not None:
            self.publisher.close()
