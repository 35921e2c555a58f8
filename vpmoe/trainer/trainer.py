"""The trainer: one stage from where it stands to its end, the same on every rank. What rank 0 says of it is telling.py's business.

It knows no algorithm: an objective turns a batch into coefficients (vpmoe.objectives), the student minimises Σ c·(−log p). All that a
step depends on is a function of (seed, step), of the state that a checkpoint holds and, in an OnPolicy stage, of its window in the bucket:
so a killed run that is resumed ends at the weights of one that was not.
"""

import logging
import math
import time
from contextlib import ExitStack, closing
from typing import Any

import torch
from torch import Tensor

from vpmoe.api.layout import layout
from vpmoe.api.progress import Progress
from vpmoe.api.stages import OnPolicy, Rescored, TeacherForced
from vpmoe.checkpoint.train_state import TrainState
from vpmoe.clock import now
from vpmoe.data.reader import BlockCache, DatasetReader
from vpmoe.failure import Permanent, Terminated
from vpmoe.model import distributed
from vpmoe.model.batch import Batch
from vpmoe.model.device import choose
from vpmoe.model.learner import Learner, Outcome
from vpmoe.model.objective import Objective
from vpmoe.model.shapes import SHAPES
from vpmoe.objectives.onpolicy import on_policy
from vpmoe.objectives.rescored import rescored
from vpmoe.objectives.teacher_forced import teacher_forced
from vpmoe.objectives.vanilla import vanilla
from vpmoe.trainer import stage_inputs
from vpmoe.trainer.checkpoint.resume import Start, begin
from vpmoe.trainer.checkpoint.writer import Checkpoints
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.data.held_out import HeldOutDocuments
from vpmoe.trainer.data.scored_documents import ScoredDocuments
from vpmoe.trainer.data.step_plan import StepPlan
from vpmoe.trainer.onpolicy.coordinator import Exchange
from vpmoe.trainer.onpolicy.publisher import Publisher, probed
from vpmoe.trainer.onpolicy.step_plan import OnPolicyCourse
from vpmoe.trainer.reporting import gpu, metrics
from vpmoe.trainer.reporting.reporter import StageReporter
from vpmoe.trainer.reporting.uploader import ProgressUploader
from vpmoe.trainer.schedule import due, ends_early, learning_rate
from vpmoe.trainer.teacher_forced.client import RemoteTeacher, meet

log = logging.getLogger(__name__)


def train(task: StageContext) -> None:
    """Train a stage to its end. Raises Terminated after a SIGTERM, with a checkpoint saved; Permanent where another attempt cannot help."""
    spec = task.run.spec
    device = choose()
    distributed.start(device, spec.student.expert_parallel)
    with ExitStack() as opened:
        report = (
            opened.enter_context(closing(ProgressUploader(task, _starting(task))))
            if distributed.rank() == 0
            else None
        )
        cache = BlockCache(task.bucket, task.scratch / "blocks")
        parts = opened.enter_context(closing(DatasetReader(task.dataset, "train", cache)))
        scored = ScoredDocuments(parts, task.scores, cache) if task.scores else None
        teacher = meet(task, device) if isinstance(task.stage, TeacherForced) else None
        learner = Learner.build(
            SHAPES[spec.student.shape],
            device,
            sequence_length=spec.training.sequence_length,
            seed=spec.training.seed,
            weight_decay=task.stage.optimizer.weight_decay,
            gradient_clip=task.stage.optimizer.gradient_clip,
            expert_parallel=spec.student.expert_parallel,
            teacher_width=teacher.width if teacher else None,
        )
        start = begin(task, learner)
        inputs = [
            task.dataset.inputs["tokenizer"],
            stage_inputs.dataset_input(task.bucket, task.dataset),
            *start.sources,
        ]
        if isinstance(task.stage, TeacherForced | OnPolicy):
            inputs.append(stage_inputs.teacher_input(task.run, task.bucket))
        if task.scores:
            inputs.append(stage_inputs.scores_input(task.bucket, task.scores))
        checkpoints = opened.enter_context(closing(Checkpoints(task, inputs, report)))
        held_out = None
        if spec.evaluation.documents:
            valid = opened.enter_context(closing(DatasetReader(task.dataset, "valid", cache)))
            held_out = HeldOutDocuments(
                valid, spec.evaluation.documents, spec.training.seed, spec.training.sequence_length
            )
        steps, exchange = course(task, parts, scored, start), None
        if isinstance(steps, OnPolicyCourse):
            exchange = Exchange(
                task, steps, opened.enter_context(closing(Publisher(task, inputs, probed(parts))))
            )
        Trainer(task, device, learner, steps, held_out, checkpoints, start, report, teacher, exchange).run()
    distributed.stop()


def course(
    task: StageContext, parts: DatasetReader, scored: ScoredDocuments | None, start: Start
) -> StepPlan | OnPolicyCourse:
    """What this rank trains on in the stage."""
    training, stage = task.run.spec.training, task.stage
    sequences, rank, ranks = (
        layout(task.run.spec.student, task.run.spec.training, stage).sequences_per_step,
        distributed.rank(),
        distributed.world_size(),
    )
    if isinstance(stage, OnPolicy):
        return OnPolicyCourse(
            task,
            parts,
            start.position,
            sequences_per_step=sequences,
            seed=training.seed,
            sequence_length=training.sequence_length,
            rank=rank,
            ranks=ranks,
        )
    return StepPlan(
        parts,
        scored,
        start.position,
        kind=stage.kind,
        share=stage.mix if isinstance(stage, Rescored) else 0.0,
        tokens=stage.tokens,
        sequences_per_step=sequences,
        seed=training.seed,
        sequence_length=training.sequence_length,
        rank=rank,
        ranks=ranks,
    )


class Trainer:
    """All that the loop of one stage uses, and the loop."""

    def __init__(
        self,
        task: StageContext,
        device: torch.device,
        learner: Learner,
        course: StepPlan | OnPolicyCourse,
        held_out: HeldOutDocuments | None,
        checkpoints: Checkpoints,
        start: Start,
        report: ProgressUploader | None,
        teacher: RemoteTeacher | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        """`report` is rank 0's alone; `teacher` a TeacherForced stage's, `exchange` an OnPolicy one's."""
        self.task = task
        self.device = device
        self.learner = learner
        self.held_out = held_out
        self.checkpoints = checkpoints
        self.start = start
        self.teacher = teacher
        self.exchange = exchange
        self.teacher_output = (
            teacher.output(SHAPES[task.run.spec.student.shape].vocabulary) if teacher else None
        )
        self.weights = task.run.spec.training.span_weights.model_dump()
        self.course = course
        self.telling = StageReporter(task, start, course, exchange, report)

    def run(self) -> None:
        """The loop. Each line says when it happens: what is global comes before the forward, what is final after the check."""
        every, stop = self.task.run.spec.evaluation.every_tokens, self.task.stage.stop
        position = self._begin()
        while not position.finished:
            step, started, before = position.steps, time.monotonic(), position.tokens
            if self.exchange and not self.exchange.ready(
                position, self._waiting
            ):  # the step's window may not be there yet
                self._stop(position)
            batches = self.course.batches(step)  # a pure function of (seed, step), and of the window
            if self.teacher:
                assert isinstance(self.course, StepPlan)
                self.teacher.begin(batches, self.course.first(step + 1))  # it is ahead by one microbatch
            counts, stopping, gpus = self._agree(batches)  # before any forward: denominators are global
            if stopping:
                self._stop(position)
            outcome = self.learner.forward_backward(
                batches, self._objective(step, counts), positions=int(counts[0])
            )
            check_finite(outcome, step)  # before the optimizer can make it permanent
            if self.exchange:
                position = self.exchange.judge(position, outcome)
            rate = self._rate(before + int(counts[0]))
            norm = self._move(rate, step)
            position = self._after(position, int(counts[0]))
            seconds = time.monotonic() - started
            self.telling.measured(position, outcome, rate, norm, gpus, int(counts[0]), seconds)
            if self.exchange:
                self.exchange.took(seconds)
                self.exchange.publish(self.learner, position)  # before an anchor step moves the weights
            ends = position.tokens >= self.task.stage.tokens
            if (self.held_out or self.exchange) and (ends or due(before, position.tokens, every)):
                position = self._evaluate(position)
            early = stop is not None and ends_early(position, stop, self.exchange is not None)
            position = position.model_copy(update={"finished": early or ends})
            self.telling.say(position, outcome)
            if position.finished or due(
                before, position.tokens, self.task.run.spec.training.checkpoint.every_tokens
            ):
                self._save(position)
            self.checkpoints.check()
            if self.exchange:
                self.exchange.check()
        self._dismiss()
        self.checkpoints.wait()
        self.telling.finished(position)
        if self.exchange:
            self.exchange.finish(early=position.tokens < self.task.stage.tokens)

    def _begin(self) -> TrainState:
        """The position to start from, with the held-out loss before the first step measured once."""
        position = self.start.position
        self.telling.begin(position)
        if self.exchange:
            self.exchange.publish(self.learner, position)  # version 0: the sampler waits for it
        if self.held_out and position.steps == 0 and position.before is None:
            position = self._evaluate(position)
            position = position.model_copy(update={"before": position.latest})
        self.telling.begun(position)
        return position

    def _agree(self, batches: list[Batch]) -> tuple[Tensor, bool, Tensor]:
        """One all-reduce a step: the global counts, whether any rank wants to stop, what the GPUs do."""
        rank, ranks = distributed.rank(), distributed.world_size()
        counts = torch.stack([batch.counts for batch in batches]).sum(0)
        wish = torch.tensor([float(self.task.stopping.is_set())], dtype=torch.float64)
        total = distributed.sum_over_ranks(
            torch.cat([counts.double(), wish, gpu.as_vector(gpu.read(self.device), rank, ranks)])
        )
        return total[: len(counts)].long(), bool(total[len(counts)]), total[len(counts) + 1 :]

    def _objective(self, step: int, counts: Tensor) -> Objective:
        """What a step of this stage minimises."""
        stage, kind = self.task.stage, self.course.kind(step)
        if isinstance(stage, TeacherForced):
            assert self.teacher is not None and self.teacher_output is not None
            return teacher_forced(
                counts, self.weights, stage.loss, self.teacher_output, self.teacher.hidden_of
            )
        if isinstance(stage, Rescored) and kind == stage.kind:
            centre = self.start.position.objective
            assert centre is not None
            return rescored(counts, self.weights, stage.confidence, centre.model_dump())
        return on_policy(counts, self.weights) if kind == "OnPolicy" else vanilla(counts, self.weights)

    def _dismiss(self) -> None:
        if self.teacher:
            self.teacher.dismiss()

    def _rate(self, seen: int) -> float:
        """Of the step after which the stage has seen so many tokens; the last step of an OnPolicy one may go beyond its total."""
        settings, total = self.task.stage.optimizer, self.course.total
        return learning_rate(
            min(seen, total),
            total,
            settings.warmup_tokens,
            settings.learning_rate,
            settings.min_learning_rate,
        )

    def _move(self, rate: float, step: int) -> float:
        try:
            return self.learner.step(rate)
        except ArithmeticError as error:
            raise not_finite(f"the gradient's norm ({error})", step) from error

    def _after(self, position: TrainState, tokens: int) -> TrainState:
        """The position one step, of so many tokens, further."""
        return position.model_copy(
            update={
                "steps": position.steps + 1,
                "iteration": position.iteration + 1,
                "tokens": position.tokens + tokens,
                **self.course.after(position),
            }
        )

    def _evaluate(self, position: TrainState) -> TrainState:
        """Measure the held-out loss, and what an OnPolicy stage's windows came to; its line joins the step's."""
        started = time.monotonic()
        facts: dict[str, Any] = {}
        if self.held_out:
            loss = self.held_out.loss(self.learner)
            whole = metrics.weighted(loss, self.weights)
            if not math.isfinite(whole):
                raise not_finite("the held-out loss", position.steps - 1)
            log.info(
                "Held-out loss after %d steps: reasoning %s, final %s",
                position.steps,
                loss.reasoning,
                loss.final,
            )
            facts |= {"heldOut": loss.model_dump(), "weighted": whole, "documents": self.held_out.documents}
            position = position.model_copy(update={"latest": loss, "held_out": (*position.held_out, whole)})
        if self.exchange:
            position = self.exchange.evaluate(position, self.weights)
            windows = position.windows
            if windows and windows.reverse_kl:
                facts |= {"reverseKl": windows.reverse_kl[-1], "validity": windows.validity}
        self.telling.add("evaluation", position, {**facts, "seconds": time.monotonic() - started})
        return position

    def _waiting(self, words: str) -> None:
        """While a window is waited for: an upload that fails is not."""
        self.checkpoints.check()
        self.telling.waiting(words)

    def _save(self, position: TrainState) -> None:
        """Save where the stage stands, once the versions before it exist: a resumed attempt cannot make them."""
        if self.exchange:
            self.exchange.wait()
        self.checkpoints.save(self.learner, position)

    def _stop(self, position: TrainState) -> None:
        """Save where the stage stands and end the process."""
        self._dismiss()
        if position.steps > self.start.position.steps and self.checkpoints.saved != position.iteration:
            self._save(position)
        self.checkpoints.wait()
        words = f"Stopped after {self.telling.step(position)}, all of it saved"
        self.telling.stopped(words)
        raise Terminated(words)


def check_finite(outcome: Outcome, step: int) -> None:
    """Raise Permanent where the step's loss is not a number, the same on every rank."""
    if not math.isfinite(outcome.loss):
        raise not_finite(f"the loss ({outcome.loss})", step)


def not_finite(what: str, step: int) -> Permanent:
    """A number that ended training: data and arithmetic are the same next time, so another attempt would meet it again."""
    return Permanent(
        f"NonFinite: {what} is not finite at step {step + 1}; the weights were not touched. In a new run, which may resumeFrom this one's "
        "last checkpoint, lower optimizer.learningRate or gradientClip, or lengthen warmupTokens."
    )


def _starting(task: StageContext) -> Progress:
    made = stage_inputs.dataset_facts(task.bucket, task.dataset)
    return Progress(
        step=task.stage.name,
        attempt=task.provenance.attempt,
        state="Running",
        message="Starting",
        updated=now(),
        dataset=made,
    )
