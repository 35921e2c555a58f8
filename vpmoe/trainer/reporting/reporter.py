"""What is said of a stage while it trains: the log, lines of metrics, progress and its conditions. Rank 0 says it, the others are silent.

report.py brings it to the bucket and metrics.py makes the parts of a line; when there is something to say is the loop's business.
"""

import logging
import os
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vpmoe.api.layout import layout
from vpmoe.api.progress import Amount, ProgressCondition
from vpmoe.checkpoint.train_state import TrainState, facts_of, held_out
from vpmoe.model import distributed
from vpmoe.model.learner import Outcome
from vpmoe.trainer.checkpoint.resume import Start
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.data.step_plan import StepPlan
from vpmoe.trainer.onpolicy.coordinator import Exchange
from vpmoe.trainer.onpolicy.step_plan import OnPolicyCourse
from vpmoe.trainer.reporting import gpu, metrics
from vpmoe.trainer.reporting.router_monitor import RouterMonitor
from vpmoe.trainer.reporting.uploader import ProgressUploader

log = logging.getLogger(__name__)

LAST_STEPS = 20
"""Steps over which tokens a second are told."""


class StageReporter:
    """One attempt at one stage. Lines of a step are collected and said together."""

    def __init__(
        self,
        task: StageContext,
        start: Start,
        course: StepPlan | OnPolicyCourse,
        exchange: Exchange | None,
        report: ProgressUploader | None,
    ) -> None:
        """`report` is rank 0's alone."""
        self.report = report
        self._task = task
        self._start = start
        self._course = course
        self._exchange = exchange
        self._lines: list[dict[str, Any]] = []
        self._watch: RouterMonitor | None = None
        self._speed: deque[tuple[int, float]] = deque(maxlen=LAST_STEPS)
        port = os.environ.get("VPMOE_METRICS_PORT")
        labels = {
            "namespace": task.run.metadata.namespace,
            "run": task.run.metadata.name,
            "stage": task.stage.name,
        }
        self._prometheus = metrics.Prometheus(labels, int(port)) if report and port else None

    def begin(self, position: TrainState) -> None:
        """Where the stage begins, or goes on."""
        steps, sequences = (
            self._course.steps,
            layout(
                self._task.run.spec.student, self._task.run.spec.training, self._task.stage
            ).sequences_per_step,
        )
        words = f"{self._start.words}, {position.steps}{f' of {steps}' if steps else ''} steps done"
        log.info(
            "Training %s %s; %d ranks, %d sequences a step",
            position.stage,
            words,
            distributed.world_size(),
            sequences,
        )
        facts = {
            "from": self._start.words,
            "refused": list(self._start.refused),
            "ranks": distributed.world_size(),
            "steps": steps,
            "sequencesPerStep": sequences,
            "stageTokens": self._course.total,
            "centre": position.objective.model_dump() if position.objective else None,
        }
        if self._exchange and position.windows:
            facts |= {"windows": position.windows.trained, "firstPrompt": position.windows.first_prompt}
        self.add("start", position, facts)
        if self.report:
            own = facts_of(self._task.bucket, self._start.own, position) if self._start.own else None
            self.report.update(message=f"Training {words}", checkpoint=own, conditions=self._conditions())

    def begun(self, position: TrainState) -> None:
        """What was measured before the first step."""
        if self.report:
            self.report.update(**self._amounts(position))
            self._say_lines(self.report)

    def add(self, event: str, position: TrainState, facts: Mapping[str, Any]) -> None:
        """A line of metrics, said with the step's others."""
        if self.report:
            self._lines.append(metrics.line(event, position, self._task.provenance.attempt, facts))

    def measured(
        self,
        position: TrainState,
        outcome: Outcome,
        rate: float,
        norm: float,
        gpus: Tensor,
        tokens: int,
        seconds: float,
    ) -> None:
        """The line of the step that led to `position`, which held so many tokens and took so long."""
        self._speed.append((tokens, seconds))
        if self.report:
            assert outcome.load is not None
            step = position.steps - 1
            self.add(
                "step",
                position,
                {
                    "kind": self._course.kind(step),
                    "loss": outcome.loss,
                    "lossBySpan": outcome.cross_entropy,
                    "targets": outcome.tokens,
                    "learningRate": rate,
                    "gradientNorm": norm,
                    "seconds": seconds,
                    "tokensPerSecond": self._tokens_per_second(),
                    "router": metrics.router(outcome.load),
                    "exercises": self._course.exercises(step),
                    "gpu": gpu.summary(gpus),
                    **outcome.facts,
                    **(self._exchange.facts() if self._exchange else {}),
                },
            )

    def say(self, position: TrainState, outcome: Outcome) -> None:
        """Log, metrics and progress of a step. Raises what the store refused for good."""
        if not self.report:
            return
        assert outcome.load is not None
        self._watch = self._watch or RouterMonitor(list(outcome.load.layers), outcome.load.tokens.shape[1])
        collapsed = self._watch.step(outcome.load.tokens.numpy(), outcome.load.max_over_mean.numpy())
        conditions = [
            ProgressCondition(type="RouterCollapse", status="True", reason=c.reason, message=c.message)
            for c in collapsed[:3]
        ]
        self.report.check()
        self._say_lines(self.report)
        log.info("%s: loss %.4f, %.0f tokens/s", self.step(position), outcome.loss, self._tokens_per_second())
        self.report.update(
            message=f"Training, {self.step(position)}",
            loss=outcome.loss,
            tokens_per_second=self._tokens_per_second(),
            conditions=self._conditions(*conditions),
            **self._amounts(position),
        )

    def waiting(self, words: str) -> None:
        """What is waited for: the loop lives. Raises what the store refused for good."""
        if self.report:
            self.report.check()
            self.report.update(message=words)

    def step(self, position: TrainState) -> str:
        """Where the stage stands, for people."""
        return f"step {position.steps}" + (f" of {self._course.steps}" if self._course.steps else "")

    def stopped(self, words: str) -> None:
        """The last words of an attempt that others follow."""
        if self.report:
            self.report.finish(message=words)

    def finished(self, position: TrainState) -> None:
        """The last words of the stage."""
        if self.report:
            done = {**self._amounts(position), "tokens": Amount(done=position.tokens, total=position.tokens)}
            self.report.finish(state="Succeeded", message=f"Finished after {position.steps} steps", **done)
        log.info("Finished stage %s: %d steps, %d tokens", position.stage, position.steps, position.tokens)

    def _say_lines(self, report: ProgressUploader) -> None:
        lines, self._lines = self._lines, []
        report.log(*lines)
        if self._prometheus:
            self._prometheus.show(lines)

    def _tokens_per_second(self) -> float:
        return sum(tokens for tokens, _ in self._speed) / sum(seconds for _, seconds in self._speed)

    def _conditions(self, *found: ProgressCondition) -> tuple[ProgressCondition, ...]:
        """What the run's status should say, the checkpoints that were passed over first."""
        refused = [
            ProgressCondition(type="CheckpointRefused", status="True", reason="Altered", message=words)
            for words in self._start.refused[:3]
        ]
        return (*refused, *(self._exchange.conditions() if self._exchange else []), *found)

    def _amounts(self, position: TrainState) -> dict[str, Any]:
        """The parts of the progress that follow from the position."""
        return {
            "tokens": Amount(done=position.tokens, total=self._course.total),
            "held_out": held_out(position),
        }
