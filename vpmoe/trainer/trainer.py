"""The trainer: runs one stage from its current state to its end, in the same way on every rank.

It knows no kind of stage: what differs between them is in stages/. Everything that a step depends on follows
from (seed, step), from the state that a checkpoint holds and, in an OnPolicy stage, from its window in the
bucket. So a run that was killed and resumed ends with the same weights as one that was not.
"""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from vpmoe.api.metrics import Sample, line_time
from vpmoe.api.pod_metrics import CHECKPOINT_SAVE_SECONDS
from vpmoe.api.progress import Progress
from vpmoe.checkpoint.train_state import SKIPPED_KEPT, SkippedStep, TrainState, figure
from vpmoe.clock import now
from vpmoe.data.dataset import dataset_facts, dataset_input
from vpmoe.data.reader import BlockCache, DatasetReader
from vpmoe.failure import Permanent, Terminated
from vpmoe.model import distributed
from vpmoe.model.batch import Batch
from vpmoe.model.device import choose
from vpmoe.model.learner import Learner, NotFinite, Outcome
from vpmoe.model.router import routers
from vpmoe.model.shapes import SHAPES
from vpmoe.model.spans import weighted_sum
from vpmoe.trainer.checkpoint.resume import Start, load_start
from vpmoe.trainer.checkpoint.writer import CheckpointWriter
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.data.held_out import HeldOutDocuments
from vpmoe.trainer.microbatch import microbatch_of_attempt
from vpmoe.trainer.reporting.gpu import as_vector, read_gpu
from vpmoe.trainer.reporting.lines import HeldOutLoss
from vpmoe.trainer.reporting.reporter import StageReporter
from vpmoe.trainer.reporting.router_monitor import Collapse, RouterMonitor
from vpmoe.trainer.reporting.uploader import ProgressUploader
from vpmoe.trainer.schedule import due, learning_rate
from vpmoe.trainer.stages.select import for_stage
from vpmoe.trainer.stages.stage_kind import StageKind
from vpmoe.trainer.teacher_forced.channel import stop_check

log = logging.getLogger(__name__)

MAX_SKIPPED = 3
"""Steps in a row that are skipped because the loss or the gradient is not finite; the next one ends the
stage. Documents are shuffled, so one that overflows is in one batch, or in two that are neighbours. What
spoils four batches in a row is in the weights, and to go on would read the data for nothing."""


def train(context: StageContext) -> None:
    """Train a stage to its end.

    Raises Terminated after a SIGTERM, with a checkpoint saved; Permanent if another attempt cannot help.
    """
    spec = context.run.spec
    device = choose()
    distributed.start(device, spec.student.expert_parallel, stop_check(context.stopping))
    with ExitStack() as opened:
        uploader = None
        if distributed.rank() == 0:
            uploader = opened.enter_context(closing(ProgressUploader(context, _first_progress(context))))
        cache = BlockCache(context.bucket, context.scratch / "blocks")
        documents = opened.enter_context(closing(DatasetReader(context.dataset, "train", cache)))
        stage = opened.enter_context(closing(for_stage(context, documents, cache, device)))
        stage.microbatch = microbatch_of_attempt(context, device, stage.teacher_width)
        learner = Learner.build(
            SHAPES[spec.student.shape],
            device,
            sequence_length=spec.training.sequence_length,
            seed=spec.training.seed,
            weight_decay=context.stage.optimizer.weight_decay,
            gradient_clip=context.stage.optimizer.gradient_clip,
            expert_parallel=spec.student.expert_parallel,
            teacher_width=stage.teacher_width,
            recomputed_layers=stage.microbatch.recomputed_layers,
            sharded_gradients=stage.microbatch.sharded_gradients,
        )
        opened.enter_context(closing(learner))
        start = load_start(context, stage, learner)
        inputs = [
            context.dataset.inputs["tokenizer"],
            dataset_input(context.bucket, context.dataset),
            *start.sources,
            *stage.inputs(),
        ]
        checkpoints = opened.enter_context(
            closing(CheckpointWriter(context, learner, inputs, start.rejected, uploader))
        )
        held_out = None
        if spec.evaluation.documents:
            valid = opened.enter_context(closing(DatasetReader(context.dataset, "valid", cache)))
            held_out = HeldOutDocuments(
                valid,
                spec.evaluation.documents,
                spec.training.seed,
                spec.training.sequence_length,
                stage.microbatch,
            )
        stage.prepare(start.state, inputs)
        Trainer(context, device, learner, stage, held_out, checkpoints, start, uploader).run()
    distributed.stop()


class Agreed(NamedTuple):
    """What all ranks know before a step."""

    counts: Tensor
    """[3] int64: positions and targets by span of the global batch."""
    stopping: bool
    """Whether any rank was asked to stop."""
    failed: bool
    """Whether a checkpoint could not be written."""
    writing: bool
    """Whether any rank is still writing a checkpoint."""
    overdue: bool
    """Whether training.checkpoint.interval has passed, by the clock of rank 0."""
    gpus: Tensor
    """[2·ranks] readings of all GPUs (gpu.as_vector)."""


class Trainer:
    """Everything that the loop of one stage uses, and the loop."""

    def __init__(
        self,
        context: StageContext,
        device: torch.device,
        learner: Learner,
        stage: StageKind,
        held_out: HeldOutDocuments | None,
        checkpoints: CheckpointWriter,
        start: Start,
        uploader: ProgressUploader | None,
    ) -> None:
        """`stage` is prepared for the state of `start`; `uploader` is rank 0's alone."""
        self.context = context
        self.device = device
        self.learner = learner
        self.stage = stage
        self.held_out = held_out
        self.checkpoints = checkpoints
        self.start = start
        self.reporter = StageReporter(context, start, stage, uploader)
        self.router_monitor = RouterMonitor(
            list(routers(learner.student)),
            learner.student.config.num_moe_experts,
            context.run.spec.training.max_collapsed_steps,
        )

    def run(self) -> None:
        """The loop. What is global is known before the forward; what is final happens after the checks."""
        spec, stop = self.context.run.spec, self.context.stage.stop
        state = self._begin()
        collapsed: list[Collapse] = []
        overdue = late = False
        """Of the next checkpoint: whether it is due, and whether its delay was reported."""
        while not state.finished:
            step, began, before = state.steps, time.monotonic(), state.tokens
            batches = self.stage.batches(
                state, self._waiting
            )  # a function of (seed, step), and of the window
            if batches is None:
                self._stop(state)
            agreed = self._agree(batches)  # before any forward: denominators are global
            if agreed.failed:
                self.checkpoints.wait()  # raises, on every rank
            if agreed.stopping:
                self._stop(state)
            if overdue and not agreed.writing:
                self._save(state)
                overdue = late = False
                agreed = agreed._replace(writing=True, overdue=False)  # another now would wait for this one
            elif overdue and not late:
                self._tell_late(state)
                late = True
            tokens = int(agreed.counts[0])
            objective = self.stage.objective(step, agreed.counts)
            outcome = self.learner.forward_backward(batches, objective, positions=tokens)
            rate = self._learning_rate(before + tokens)
            state, norm = self._move_weights(state, outcome, rate, tokens)
            state = self._advance(state, tokens)
            seconds, ended = time.monotonic() - began, line_time()
            self.stage.after_step(self.learner, state, seconds)  # the line says how long it waited
            if norm is None:
                self.reporter.log_skipped(state, tokens=tokens, seconds=seconds, ended=ended)
            else:
                self.reporter.log_step(
                    state,
                    outcome,
                    learning_rate=rate,
                    gradient_norm=norm,
                    gpus=agreed.gpus,
                    tokens=tokens,
                    seconds=seconds,
                    ended=ended,
                )
                collapsed = self._watch_routers(outcome)  # the loads of a skipped step mean nothing
            spent = state.tokens >= self.context.stage.tokens
            if spent or due(before, state.tokens, spec.evaluation.every_tokens):
                state = self._evaluate(state)
            early = stop is not None and self.stage.ends_early(state, stop)
            state = state.model_copy(update={"finished": early or spent})
            self.reporter.flush(state, None if norm is None else outcome, collapsed)
            overdue |= agreed.overdue or due(before, state.tokens, spec.training.checkpoint.every_tokens)
            if state.finished or (overdue and not agreed.writing):
                self._save(state)
                overdue = late = False
            if not state.finished and (ending := self.router_monitor.over_limit(collapsed)):
                self._end_collapsed(state, ending)
            self.stage.check()
        self.stage.stop()
        self.checkpoints.wait()
        self.reporter.finished(state)
        self.stage.finish(state)

    def _begin(self) -> TrainState:
        """The state to start from. Measures the held-out loss before the stage's first step, once."""
        state = self.start.state
        self.reporter.starting(state)
        self.stage.begin(self.learner, state)
        if self.held_out and state.steps == 0 and state.before is None:
            state = self._evaluate(state)
            state = state.model_copy(update={"before": state.latest})
        self.reporter.started(state)
        return state

    def _agree(self, batches: list[Batch]) -> Agreed:
        """One all-reduce a step: what all ranks must know, and act on alike."""
        rank, ranks = distributed.rank(), distributed.world_size()
        counts = torch.stack([batch.counts for batch in batches]).sum(0)
        interval = self.context.run.spec.training.checkpoint.interval
        flags = [
            self.context.stopping.is_set(),
            self.checkpoints.failed,
            self.checkpoints.writing,
            rank == 0 and 0 < interval <= self.checkpoints.age,
        ]
        total = distributed.sum_over_ranks(
            torch.cat(
                [
                    counts.double(),
                    torch.tensor(flags, dtype=torch.float64),
                    as_vector(read_gpu(self.device), rank, ranks),
                ]
            )
        )
        counts, flags_F, gpus = torch.split(total, [len(counts), len(flags), 2 * ranks])
        stopping, failed, writing, overdue = (flags_F > 0).tolist()
        return Agreed(counts.long(), stopping, failed, writing, overdue, gpus)

    def _learning_rate(self, seen: int) -> float:
        """Of the step after which the stage has seen `seen` tokens. Only the last step of an OnPolicy stage
        exceeds its total."""
        optimizer, total = self.context.stage.optimizer, self.stage.plan.total
        return learning_rate(
            min(seen, total),
            total,
            optimizer.warmup_tokens,
            optimizer.learning_rate,
            optimizer.min_learning_rate,
        )

    def _move_weights(
        self, state: TrainState, outcome: Outcome, rate: float, tokens: int
    ) -> tuple[TrainState, float | None]:
        """Take the optimizer step: the state with what was measured, and the gradient's norm.

        If the loss or the norm is not finite, no weight moves: the state with the skipped step, and None.
        Every rank has the same loss and norm, so all decide the same. Raises Permanent after MAX_SKIPPED
        such steps in a row.
        """
        finite = math.isfinite(outcome.loss)
        checked = self.stage.check_step(state, outcome) if finite else state
        self.checkpoints.hold_changes()
        try:
            return checked, self.learner.step(rate)
        except NotFinite as error:
            what = f"the gradient's norm ({error.norm})" if finite else f"the loss ({outcome.loss})"
            if state.skipped_in_a_row >= MAX_SKIPPED:
                raise not_finite(what, state) from error
            return self._skip(state, outcome, error.norm, tokens), None

    def _skip(self, state: TrainState, outcome: Outcome, norm: float, tokens: int) -> TrainState:
        """The state with the step at hand recorded as skipped."""
        skipped = SkippedStep(
            step=state.steps + 1,
            number=state.skipped[-1].number + 1 if state.skipped else 1,
            kind=self.stage.plan.kind(state.steps),
            tokens=tokens,
            loss=figure(outcome.loss),
            loss_by_rank=tuple(map(figure, outcome.loss_by_rank)),
            gradient_norm=figure(norm),
            batch=self.stage.plan.describe(state.steps),
        )
        return state.model_copy(
            update={
                "skipped": (*state.skipped, skipped)[-SKIPPED_KEPT:],
                "skipped_iterations": state.skipped_iterations + 1,
            }
        )

    def _advance(self, state: TrainState, tokens: int) -> TrainState:
        """The state after one more step, of `tokens` tokens."""
        counts = {
            "steps": state.steps + 1,
            "iteration": state.iteration + 1,
            "tokens": state.tokens + tokens,
        }
        return self.stage.plan.advance(state).model_copy(update=counts)

    def _evaluate(self, state: TrainState) -> TrainState:
        """The state with the held-out loss, and with what the kind of stage measures. Adds the line of
        metrics."""
        began, loss, of_kind = time.monotonic(), None, None
        if self.held_out:
            measured = self.held_out.loss(self.learner)
            weighted = weighted_sum(
                {"reasoning": measured.reasoning, "final": measured.final}, self.stage.span_weights
            )
            if not math.isfinite(weighted):
                raise not_finite("the held-out loss", state)
            loss = HeldOutLoss(held_out=measured, weighted=weighted, documents=self.held_out.documents)
            state = state.model_copy(update={"latest": measured, "held_out": (*state.held_out, weighted)})
        try:
            evaluation = self.stage.evaluate(self.learner, state)
        except ArithmeticError as error:
            raise not_finite(str(error), state) from error
        if evaluation:
            state, of_kind = evaluation
        if loss or evaluation:
            self.reporter.log_evaluation(state, loss, of_kind, time.monotonic() - began)
        return state

    def _watch_routers(self, outcome: Outcome) -> list[Collapse]:
        """The layers whose router is collapsed after a step, the same on every rank: the loads are global."""
        load = outcome.load
        assert load is not None
        return self.router_monitor.add_step(load.tokens.numpy(), load.max_over_mean.numpy())

    def _end_collapsed(self, state: TrainState, ending: Sequence[Collapse]) -> NoReturn:
        """Save the state and raise Permanent."""
        self._stop_and_save(state)
        others = f" (and {len(ending) - 1} more layers)" if len(ending) > 1 else ""
        raise Permanent(
            f"RouterCollapse: {ending[0].message}{others}. That is training.maxCollapsedSteps "
            f"({self.router_monitor.limit}), so the stage ends after {self.reporter.step_of(state)}; "
            f"checkpoint {state.iteration} has its state. To go on from there all the same, raise "
            "runtime.attempts: the next attempt counts anew. Or start a new run, which may resumeFrom this "
            "one's last checkpoint, with a lower optimizer.learningRate or another "
            "training.maxCollapsedSteps (0 never ends a stage)."
        )

    def _waiting(self, message: str) -> None:
        """Called while a step is waited for, so that an upload that fails ends the wait."""
        self.checkpoints.check()
        self.reporter.waiting(message)

    def _save(self, state: TrainState) -> None:
        began = time.monotonic()
        self.stage.before_checkpoint()
        self.checkpoints.save(state)
        stopped = Sample(CHECKPOINT_SAVE_SECONDS, time.monotonic() - began)
        self.context.board.metrics.record([stopped])

    def _tell_late(self, state: TrainState) -> None:
        """Say that the checkpoint at `state` has to wait; rank 0 says it for all."""
        if distributed.rank() == 0:
            log.warning(
                "Checkpoint %d is due, but checkpoint %s is still being written, for %.0f s so far. Training "
                "goes on, and the next checkpoint follows when that one exists. To lose less work in a "
                "failure, give the bucket more bandwidth; to write less, raise "
                "training.checkpoint.everyTokens and interval",
                state.iteration,
                self.checkpoints.saved,
                self.checkpoints.age,
            )

    def _stop(self, state: TrainState) -> NoReturn:
        """Save the state and raise Terminated."""
        self._stop_and_save(state)
        message = f"Stopped after {self.reporter.step_of(state)}, all of it saved"
        self.reporter.stopped(message)
        raise Terminated(message)

    def _stop_and_save(self, state: TrainState) -> None:
        """Make no more steps; return when the state is in the bucket."""
        self.stage.stop()
        if state.steps > self.start.state.steps and self.checkpoints.saved != state.iteration:
            self._save(state)
        self.checkpoints.wait()


def not_finite(what: str, state: TrainState) -> Permanent:
    """The error of a number that ended training, after the steps of `state`. Another attempt would have the
    same data and arithmetic, and meet it again."""
    skipped = state.skipped_in_a_row
    row = f", and neither were those of the {skipped} steps before, which were skipped" if skipped else ""
    return Permanent(
        f"NonFinite: {what} is not finite after {state.steps} steps{row}; the weights were not touched. In a "
        "new run, which may resumeFrom this one's last checkpoint, lower optimizer.learningRate or "
        "gradientClip, or lengthen warmupTokens."
    )


def _first_progress(context: StageContext) -> Progress:
    return Progress(
        run=context.provenance.run,
        step=context.stage.name,
        attempt=context.provenance.attempt,
        state="Running",
        message="Starting",
        updated=now(),
        dataset=dataset_facts(context.bucket, context.dataset),
    )
