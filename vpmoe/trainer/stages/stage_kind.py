"""What a kind of training stage provides to the trainer. Operations that most kinds do not need do nothing
here."""

# ruff: noqa: B027 (empty methods of an abstract class: the kinds override those that they need)

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from vpmoe.api.layout import layout
from vpmoe.api.metrics import Measures
from vpmoe.api.microbatch import Microbatch
from vpmoe.api.progress import ProgressCondition
from vpmoe.api.stages import Stop
from vpmoe.checkpoint.train_state import TrainState
from vpmoe.data.reader import DatasetReader
from vpmoe.model import distributed
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner, Outcome
from vpmoe.model.objective import Objective
from vpmoe.model.spans import weighted_sum
from vpmoe.storage.manifest import Input
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.data.scored_documents import ScoredDocuments
from vpmoe.trainer.data.step_plan import DatasetSteps, StepPlan
from vpmoe.trainer.schedule import no_longer_improves
from vpmoe.trainer.stages.validity import ValidityEvaluation, ValidityReader


class StepLoss(NamedTuple):
    """The number by which people follow a stage. It means the same in every step of the stage, whatever the
    step minimises."""

    name: str
    """What it is, for the log."""
    value: float
    reported: bool = True
    """Whether it is the `loss` of progress.json. An anchor step's is in the log alone."""


class StageEvaluation(NamedTuple):
    """What a kind of stage adds to an evaluation."""

    state: TrainState
    measures: Measures | None
    """For the line of metrics; None if there is nothing to measure yet."""


class StageKind(ABC):
    """One attempt at a stage, on one rank. Operations are listed in the order in which the trainer calls
    them."""

    plan: StepPlan
    """The stage's steps. Set by `prepare`."""
    microbatch: Microbatch
    """How this rank's sequences are divided. Set by the trainer, before `prepare`."""
    teacher_width: int | None = None
    """Width of the hidden states of a teacher that runs beside the students."""

    def __init__(self, context: StageContext, documents: DatasetReader) -> None:
        """`documents` is the training split."""
        self.context = context
        self.documents = documents
        self.span_weights = context.run.spec.training.span_weights.model_dump()
        self._validity = ValidityReader(context) if context.run.measures_validity(context.stage) else None

    # Before the first step

    def check_resumed(self, state: TrainState) -> None:
        """Raise Permanent if the stage cannot continue from `state`, which an earlier attempt saved."""

    def first_state(self, state: TrainState) -> TrainState:
        """The state in which the stage begins: `state` and what the stage fixes at its beginning."""
        return state

    def inputs(self) -> list[Input]:
        """What the weights are made from beside tokenizer, dataset and checkpoint, for the manifests."""
        return []

    @abstractmethod
    def prepare(self, state: TrainState, inputs: Sequence[Input]) -> None:
        """Make the plan and open what the steps need. `inputs` is everything that the weights are made from.

        Raises Permanent if there is nothing to train on.
        """

    def begin(self, learner: Learner, state: TrainState) -> None:
        """Called once in an attempt, before its first step."""

    def start_metrics(self, state: TrainState) -> Measures | None:
        """What only this kind has in the line of an attempt's start."""
        return None

    # Each step

    def batches(self, state: TrainState, waiting: Callable[[str], None]) -> list[Batch] | None:
        """This rank's microbatches of the step after `state`. Every rank calls it.

        While the step has to be waited for, `waiting` is called about once a second with a message. Returns
        None if any rank was asked to stop during the wait.
        """
        return self.plan.batches(state.steps)

    @abstractmethod
    def objective(self, step: int, counts: Tensor) -> Objective:
        """What a step minimises. `counts` is [positions, N_reasoning, N_final] of the global batch."""

    def check_step(self, state: TrainState, outcome: Outcome) -> TrainState:
        """The state with what the forward has measured. Raises Permanent if the weights must not move. Not
        called if the loss is not finite; the state is dropped if the gradient is not."""
        return state

    def step_loss(self, step: int, outcome: Outcome) -> StepLoss:
        """The cross-entropy with spans weighted, in nats a token: comparable between all stages that minimise
        one."""
        return StepLoss("loss", weighted_sum(outcome.cross_entropy, self.span_weights))

    def after_step(self, learner: Learner, state: TrainState, seconds: float) -> None:
        """Called when the stage is at `state`, after a step that took `seconds`, waiting included. The step
        has moved the weights, unless it was skipped."""

    def step_metrics(self) -> Measures | None:
        """What only this kind has in the line of a step. Rank 0 calls it, after `after_step`."""
        return None

    def evaluate(self, learner: Learner, state: TrainState) -> StageEvaluation | None:
        """What an evaluation measures beside the held-out loss; None if that is nothing. Every rank calls it.

        Raises ArithmeticError, on every rank, with what it measured if that is not finite.
        """
        if self._validity is None:
            return None
        found = self._validity.known(state)
        return StageEvaluation(
            state.model_copy(update={"validity": found}),
            ValidityEvaluation(
                validity=None if found is None else found.share,
                validity_iteration=None if found is None else found.iteration,
            ),
        )

    def ends_early(self, state: TrainState, stop: Stop) -> bool:
        """Whether the stage has stopped improving and is as valid as `stop` requires. It follows from the
        evaluations in the state alone.

        Before the first measurement of validity the stage cannot have reached one that is required.
        """
        reached = state.validity is not None and state.validity.share >= stop.min_validity
        return (reached or stop.min_validity == 0) and no_longer_improves(state.held_out, stop)

    def before_checkpoint(self) -> None:
        """Called before a checkpoint is saved. Returns once everything exists that a resumed attempt could
        not make."""

    def conditions(self) -> list[ProgressCondition]:
        """Conditions for the run's status."""
        return []

    def check(self) -> None:
        """Raise the error of background work that has failed; does not wait."""

    # After the last step

    def stop(self) -> None:
        """Called when the attempt makes no more steps, whether the stage has finished or not."""

    def finish(self, state: TrainState) -> None:
        """Called when the stage has finished and its last checkpoint exists."""

    def close(self) -> None:
        """End threads. Also called after an error."""

    def dataset_steps(
        self,
        state: TrainState,
        kind: str,
        scored: ScoredDocuments | None = None,
        scored_kind: str = "",
        scored_share: float = 0.0,
    ) -> DatasetSteps:
        """The StepPlan of a stage on the dataset; see DatasetSteps."""
        training = self.context.run.spec.training
        return DatasetSteps(
            self.documents,
            state,
            kind=kind,
            tokens=self.context.stage.tokens,
            sequences_per_step=self.sequences_per_step,
            seed=training.seed,
            sequence_length=training.sequence_length,
            rank=distributed.rank(),
            ranks=distributed.world_size(),
            microbatch=self.microbatch,
            scored=scored,
            scored_kind=scored_kind,
            scored_share=scored_share,
        )

    @property
    def sequences_per_step(self) -> int:
        """Packed sequences of one optimizer step on the dataset, on all ranks."""
        spec = self.context.run.spec
        return layout(spec.student, spec.training, self.context.stage).sequences_per_step
