"""The trainer: one stage from where it stands to its end, the same on every rank. Rank 0 also says how it goes.

It knows no algorithm: an objective turns a batch into coefficients (vpmoe.objectives), the student minimises Σ c·(−log p). All that a
step depends on is a function of (seed, step) and of the state that a checkpoint holds, so a killed run that is resumed ends at the
weights of one that was not.
"""

import logging
import math
import os
import time
from collections import deque
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from vpmoe.api.layout import layout
from vpmoe.api.progress import Amount, Progress, ProgressCondition
from vpmoe.api.stages import OnPolicy, Rescored, TeacherForced
from vpmoe.failure import Permanent, Terminated
from vpmoe.model import distributed
from vpmoe.model.batch import Batch
from vpmoe.model.device import choose
from vpmoe.model.learner import Learner, Outcome
from vpmoe.model.shapes import SHAPES
from vpmoe.objectives.forced import teacher_forced
from vpmoe.objectives.objective import Objective
from vpmoe.objectives.onpolicy import on_policy
from vpmoe.objectives.rescored import rescored
from vpmoe.objectives.vanilla import vanilla
from vpmoe.training import gpu, metrics, stage
from vpmoe.training.checkpoint import Checkpoints
from vpmoe.training.collapse import Watch
from vpmoe.training.course import Course
from vpmoe.training.evaluate import HeldOutDocuments
from vpmoe.training.exchange import Exchange
from vpmoe.training.forced.remote import RemoteTeacher, meet
from vpmoe.training.onpolicy import OnPolicyCourse
from vpmoe.training.parts import Cache, Parts
from vpmoe.training.position import Position, facts_of, held_out
from vpmoe.training.publish import Publisher, probed
from vpmoe.training.report import Report
from vpmoe.training.schedule import due, ends_early, learning_rate
from vpmoe.training.scored import ScoredParts
from vpmoe.training.start import Start, begin
from vpmoe.training.task import Task

log = logging.getLogger(__name__)


def train(task: Task) -> None:
    """Train a stage to its end. Raises Terminated after a SIGTERM, with a checkpoint saved; Permanent where another attempt cannot help."""
    spec = task.run.spec
    device = choose()
    distributed.start(device, spec.student.expert_parallel)
    with ExitStack() as opened:
        report = opened.enter_context(closing(Report(task, _starting(task)))) if distributed.rank() == 0 else None
        cache = Cache(task.bucket, task.scratch / "blocks")
        parts = opened.enter_context(closing(Parts(task.dataset, "train", cache)))
        scored = ScoredParts(parts, task.scores, cache) if task.scores else None
        teacher = meet(task, device) if isinstance(task.stage, TeacherForced) else None
        learner = Learner.build(
            SHAPES[spec.student.shape], device, sequence_length=spec.training.sequence_length, seed=spec.training.seed,
            weight_decay=task.stage.optimizer.weight_decay, gradient_clip=task.stage.optimizer.gradient_clip,
            expert_parallel=spec.student.expert_parallel, teacher_width=teacher.width if teacher else None,
        )  # fmt: skip
        start = begin(task, learner)
        inputs = [task.dataset.inputs["tokenizer"], stage.dataset_input(task.bucket, task.dataset), *start.sources]
        if isinstance(task.stage, TeacherForced | OnPolicy):
            inputs.append(stage.teacher_input(task.run, task.bucket))
        if task.scores:
            inputs.append(stage.scores_input(task.bucket, task.scores))
        checkpoints = opened.enter_context(closing(Checkpoints(task, inputs, report)))
        held_out = None
        if spec.evaluation.documents:
            valid = opened.enter_context(closing(Parts(task.dataset, "valid", cache)))
            held_out = HeldOutDocuments(valid, spec.evaluation.documents, spec.training.seed, spec.training.sequence_length)
        steps, exchange = course(task, parts, scored, start), None
        if isinstance(steps, OnPolicyCourse):
            exchange = Exchange(task, steps, opened.enter_context(closing(Publisher(task, inputs, probed(parts)))))
        Trainer(task, device, learner, steps, held_out, checkpoints, start, report, teacher, exchange).run()
    distributed.stop()


def course(task: Task, parts: Parts, scored: ScoredParts | None, start: Start) -> Course | OnPolicyCourse:
    """What this rank trains on in the stage."""
    training, stage = task.run.spec.training, task.stage
    sequences, rank, ranks = layout(task.run.spec, stage).sequences_per_step, distributed.rank(), distributed.ranks()
    if isinstance(stage, OnPolicy):
        return OnPolicyCourse(
            task, parts, start.position, sequences_per_step=sequences, seed=training.seed, sequence_length=training.sequence_length,
            rank=rank, ranks=ranks,
        )  # fmt: skip
    return Course(
        parts, scored, start.position, kind=stage.kind, share=stage.mix if isinstance(stage, Rescored) else 0.0, tokens=stage.tokens,
        sequences_per_step=sequences, seed=training.seed, sequence_length=training.sequence_length, rank=rank, ranks=ranks,
    )  # fmt: skip


class Trainer:
    """All that the loop of one stage uses, and the loop."""

    def __init__(
        self, task: Task, device: torch.device, learner: Learner, course: Course | OnPolicyCourse, held_out: HeldOutDocuments | None,
        checkpoints: Checkpoints, start: Start, report: Report | None, teacher: RemoteTeacher | None = None,
        exchange: Exchange | None = None,
    ) -> None:  # fmt: skip
        """`report` is rank 0's alone; `teacher` a TeacherForced stage's, `exchange` an OnPolicy one's."""
        self.task = task
        self.device = device
        self.learner = learner
        self.held_out = held_out
        self.checkpoints = checkpoints
        self.report = report
        self.start = start
        self.teacher = teacher
        self.exchange = exchange
        self.teacher_output = teacher.output(SHAPES[task.run.spec.student.shape].vocabulary) if teacher else None
        self.layout = layout(task.run.spec, task.stage)
        self.weights = task.run.spec.training.span_weights.model_dump()
        self.course = course
        self.watch: Watch | None = None
        self.speed: deque[tuple[int, float]] = deque(maxlen=20)
        port = os.environ.get("VPMOE_METRICS_PORT")
        labels = {"namespace": task.run.metadata.namespace, "run": task.run.metadata.name, "stage": task.stage.name}
        self.prometheus = metrics.Prometheus(labels, int(port)) if report and port else None

    def run(self) -> None:
        """The loop. Each line says when it happens: what is global comes before the forward, what is final after the check."""
        every, stop = self.task.run.spec.evaluation.every_tokens, self.task.stage.stop
        position = self._begin()
        while not position.finished:
            step, started, before = position.steps, time.monotonic(), position.tokens
            if self.exchange and not self.exchange.ready(position, self._waiting):  # the step's window may not be there yet
                self._stop(position)
            batches = self.course.batches(step)  # a pure function of (seed, step), and of the window
            if self.teacher:
                assert isinstance(self.course, Course)
                self.teacher.begin(batches, self.course.first(step + 1))  # it is ahead by one microbatch
            counts, stopping, gpus = self._agree(batches)  # before any forward: denominators are global
            if stopping:
                self._stop(position)
            outcome = self.learner.forward_backward(batches, self._objective(step, counts), positions=int(counts[0]))
            check_finite(outcome, step)  # before the optimizer can make it permanent
            if self.exchange:
                position = self.exchange.judge(position, outcome)
            rate = self._rate(before + int(counts[0]))
            norm = self._move(rate, step)
            position = self._after(position, int(counts[0]))
            self.speed.append((int(counts[0]), time.monotonic() - started))
            lines = [self._line(position, outcome, rate, norm, gpus)] if self.report else []
            if self.exchange:
                self.exchange.took(self.speed[-1][1])
                self.exchange.publish(self.learner, position)  # before an anchor step moves the weights
            ends = position.tokens >= self.task.stage.tokens
            if (self.held_out or self.exchange) and (ends or due(before, position.tokens, every)):
                position = self._evaluate(position, lines)
            early = stop is not None and ends_early(position, stop, self.exchange is not None)
            position = position.model_copy(update={"finished": early or ends})
            self._say(position, outcome, lines)
            if position.finished or due(before, position.tokens, self.task.run.spec.training.checkpoint.every_tokens):
                self._save(position)
            self.checkpoints.check()
            if self.exchange:
                self.exchange.check()
        self._dismiss()
        self.checkpoints.wait()
        if self.report:
            self.report.finish(state="Succeeded", message=f"Finished after {position.steps} steps", **_amounts(position, position.tokens))
        if self.exchange:
            self.exchange.finish(early=position.tokens < self.task.stage.tokens)
        log.info("Finished stage %s: %d steps, %d tokens", position.stage, position.steps, position.tokens)

    def _begin(self) -> Position:
        """The position to start from, with the held-out loss before the first step measured once."""
        position, lines = self.start.position, []
        steps = self.course.steps
        words = f"{self.start.words}, {position.steps}{f' of {steps}' if steps else ''} steps done"
        log.info(
            "Training %s %s; %d ranks, %d sequences a step", position.stage, words, distributed.ranks(), self.layout.sequences_per_step
        )
        if self.report:
            facts = {"from": self.start.words, "refused": list(self.start.refused), "ranks": distributed.ranks(), "steps": steps,
                     "sequencesPerStep": self.layout.sequences_per_step, "stageTokens": self.course.total,
                     "centre": position.objective.model_dump() if position.objective else None}  # fmt: skip
            if self.exchange and position.windows:
                facts |= {"windows": position.windows.trained, "firstPrompt": position.windows.first_prompt}
            lines = [metrics.line("start", position, self.task.provenance.attempt, facts)]
            own = facts_of(self.task.bucket, self.start.own, position) if self.start.own else None
            self.report.update(message=f"Training {words}", checkpoint=own, conditions=self._conditions([]))
        if self.exchange:
            self.exchange.publish(self.learner, position)  # version 0: the sampler waits for it
        if self.held_out and position.steps == 0 and position.before is None:
            position = self._evaluate(position, lines)
            position = position.model_copy(update={"before": position.latest})
        if self.report:
            self.report.update(**_amounts(position, self.course.total))
            self.report.log(*lines)
        return position

    def _agree(self, batches: list[Batch]) -> tuple[Tensor, bool, Tensor]:
        """One all-reduce a step: the global counts, whether any rank wants to stop, what the GPUs do."""
        rank, ranks = distributed.rank(), distributed.ranks()
        counts = torch.stack([batch.counts for batch in batches]).sum(0)
        wish = torch.tensor([float(self.task.stopping.is_set())], dtype=torch.float64)
        total = distributed.total(torch.cat([counts.double(), wish, gpu.as_vector(gpu.read(self.device), rank, ranks)]))
        return total[: len(counts)].long(), bool(total[len(counts)]), total[len(counts) + 1 :]

    def _objective(self, step: int, counts: Tensor) -> Objective:
        """What a step of this stage minimises."""
        stage, kind = self.task.stage, self.course.kind(step)
        if isinstance(stage, TeacherForced):
            assert self.teacher is not None and self.teacher_output is not None
            return teacher_forced(counts, self.weights, stage.loss, self.teacher_output, self.teacher.hidden_of)
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
        return learning_rate(min(seen, total), total, settings.warmup_tokens, settings.learning_rate, settings.min_learning_rate)

    def _move(self, rate: float, step: int) -> float:
        try:
            return self.learner.step(rate)
        except ArithmeticError as error:
            raise not_finite(f"the gradient's norm ({error})", step) from error

    def _after(self, position: Position, tokens: int) -> Position:
        """The position one step, of so many tokens, further."""
        return position.model_copy(update={
            "steps": position.steps + 1, "iteration": position.iteration + 1, "tokens": position.tokens + tokens,
            **self.course.after(position),
        })  # fmt: skip

    def _evaluate(self, position: Position, lines: list[dict[str, Any]]) -> Position:
        """Measure the held-out loss, and what an OnPolicy stage's windows came to; its line joins the step's."""
        started = time.monotonic()
        facts: dict[str, Any] = {}
        if self.held_out:
            loss = self.held_out.loss(self.learner)
            whole = metrics.weighted(loss, self.weights)
            if not math.isfinite(whole):
                raise not_finite("the held-out loss", position.steps - 1)
            log.info("Held-out loss after %d steps: reasoning %s, final %s", position.steps, loss.reasoning, loss.final)
            facts |= {"heldOut": loss.model_dump(), "weighted": whole, "documents": self.held_out.documents}
            position = position.model_copy(update={"latest": loss, "held_out": (*position.held_out, whole)})
        if self.exchange:
            position = self.exchange.evaluate(position, self.weights)
            windows = position.windows
            if windows and windows.reverse_kl:
                facts |= {"reverseKl": windows.reverse_kl[-1], "validity": windows.validity}
        if self.report:
            facts["seconds"] = time.monotonic() - started
            lines.append(metrics.line("evaluation", position, self.task.provenance.attempt, facts))
        return position

    def _line(self, position: Position, outcome: Outcome, rate: float, norm: float, gpus: Tensor) -> dict[str, Any]:
        """The step's line of metrics."""
        assert outcome.load is not None
        step = position.steps - 1
        return metrics.line("step", position, self.task.provenance.attempt, {
            "kind": self.course.kind(step), "loss": outcome.loss, "lossBySpan": outcome.cross_entropy, "targets": outcome.tokens,
            "learningRate": rate, "gradientNorm": norm, "seconds": self.speed[-1][1], "tokensPerSecond": self._tokens_per_second(),
            "router": metrics.router(outcome.load), "exercises": self.course.exercises(step), "gpu": gpu.summary(gpus),
            **outcome.facts, **(self.exchange.facts() if self.exchange else {}),
        })  # fmt: skip

    def _say(self, position: Position, outcome: Outcome, lines: list[dict[str, Any]]) -> None:
        """Log, metrics and progress of a step."""
        if not self.report:
            return
        assert outcome.load is not None
        self.watch = self.watch or Watch(list(outcome.load.layers), outcome.load.tokens.shape[1])
        collapsed = self.watch.step(outcome.load.tokens.numpy(), outcome.load.max_over_mean.numpy())
        conditions = [ProgressCondition(type="RouterCollapse", status="True", reason=c.reason, message=c.message) for c in collapsed[:3]]
        self.report.check()
        self.report.log(*lines)
        if self.prometheus:
            self.prometheus.show(lines)
        of = self._step(position)
        log.info("%s: loss %.4f, %.0f tokens/s", of, outcome.loss, self._tokens_per_second())
        self.report.update(
            message=f"Training, {of}", loss=outcome.loss, tokens_per_second=self._tokens_per_second(),
            conditions=self._conditions(conditions), **_amounts(position, self.course.total),
        )  # fmt: skip

    def _waiting(self, words: str) -> None:
        """Say what is waited for; the loop lives on, and an upload that fails is not waited for."""
        self.checkpoints.check()
        if self.report:
            self.report.check()
            self.report.update(message=words)

    def _step(self, position: Position) -> str:
        return f"step {position.steps}" + (f" of {self.course.steps}" if self.course.steps else "")

    def _tokens_per_second(self) -> float:
        return sum(tokens for tokens, _ in self.speed) / sum(seconds for _, seconds in self.speed)

    def _conditions(self, found: list[ProgressCondition]) -> tuple[ProgressCondition, ...]:
        """What the run's status should say, the checkpoints that were passed over first."""
        refused = [
            ProgressCondition(type="CheckpointRefused", status="True", reason="Altered", message=words) for words in self.start.refused[:3]
        ]
        return (*refused, *(self.exchange.conditions() if self.exchange else []), *found)

    def _save(self, position: Position) -> None:
        """Save where the stage stands, once the versions before it exist: a resumed attempt cannot make them."""
        if self.exchange:
            self.exchange.wait()
        self.checkpoints.save(self.learner, position)

    def _stop(self, position: Position) -> None:
        """Save where the stage stands and end the process."""
        self._dismiss()
        if position.steps > self.start.position.steps and self.checkpoints.saved != position.iteration:
            self._save(position)
        self.checkpoints.wait()
        words = f"Stopped after {self._step(position)}, all of it saved"
        if self.report:
            self.report.finish(message=words)
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


def _starting(task: Task) -> Progress:
    made = stage.dataset_facts(task.bucket, task.dataset)
    return Progress(
        step=task.stage.name, attempt=task.provenance.attempt, state="Running", message="Starting", updated=datetime.now(UTC), dataset=made
    )


def _amounts(position: Position, total: int) -> dict[str, Any]:
    """The parts of the progress that follow from the position."""
    return {"tokens": Amount(done=position.tokens, total=total), "held_out": held_out(position)}
