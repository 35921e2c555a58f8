"""Reports a stage while it trains: log, lines of metrics, progress and its conditions. Only rank 0 has
something to write to.

The lines are in lines.py; uploader.py writes them to the bucket.
"""

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vpmoe.api import pod_metrics
from vpmoe.api.metrics import Measures, Sample
from vpmoe.api.progress import Amount, ProgressCondition
from vpmoe.checkpoint.train_state import SkippedStep, TrainState, checkpoint_facts, held_out_losses
from vpmoe.model import distributed
from vpmoe.model.learner import Outcome
from vpmoe.trainer.checkpoint.resume import Start
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.reporting.gpu import use_of_ranks
from vpmoe.trainer.reporting.lines import (
    EvaluationLine,
    HeldOutLoss,
    SkippedLine,
    StartLine,
    StepLine,
    TrainerLine,
    router_load,
)
from vpmoe.trainer.reporting.router_monitor import Collapse
from vpmoe.trainer.reporting.uploader import ProgressUploader
from vpmoe.trainer.stages.stage_kind import StageKind

log = logging.getLogger(__name__)

LATEST_STEPS = 20
"""Steps over which the reported tokens a second are averaged."""


class StageReporter:
    """One attempt at one stage. The lines of a step are collected and written together."""

    def __init__(
        self, context: StageContext, start: Start, stage: StageKind, uploader: ProgressUploader | None
    ) -> None:
        """`uploader` is rank 0's alone."""
        self.uploader = uploader
        self._context = context
        self._start = start
        self._stage = stage
        self._lines: list[TrainerLine] = []
        self._speed: deque[tuple[int, float]] = deque(maxlen=LATEST_STEPS)

    def starting(self, state: TrainState) -> None:
        """Report what the attempt starts from."""
        plan, sequences = self._stage.plan, self._stage.sequences_per_step
        done = f"{state.steps}{f' of {plan.steps}' if plan.steps else ''} steps done"
        log.info(
            "Training stage %s %s, %s; %d ranks, %d sequences a step",
            state.stage,
            self._start.origin,
            done,
            distributed.world_size(),
            sequences,
        )
        if self.uploader:
            line = StartLine(
                **self._position(state),
                origin=self._start.origin,
                refused=tuple(self._start.rejected.values()),
                skipped=state.skipped[-1].number if state.skipped else 0,
                ranks=distributed.world_size(),
                steps=plan.steps,
                sequences_per_step=sequences,
                stage_tokens=plan.total,
                centre=state.objective.model_dump() if state.objective else None,
                of_kind=self._stage.start_metrics(state),
            )
            self._lines.append(line)
            own = checkpoint_facts(self._context.bucket, self._start.own, state) if self._start.own else None
            message = f"Training {self._start.origin}, {done}"
            self.uploader.update(message=message, checkpoint=own, conditions=self._conditions(state))

    def _position(self, state: TrainState) -> dict[str, Any]:
        """What every line says of where the stage is."""
        return {
            "attempt": self._context.provenance.attempt,
            "step": state.steps,
            "iteration": state.iteration,
            "tokens": state.tokens,
            "epoch": state.epoch,
        }

    def started(self, state: TrainState) -> None:
        """Report what was measured before the first step."""
        if self.uploader:
            self.uploader.update(**self._amounts(state))
            self._write_lines(self.uploader)

    def log_step(
        self,
        state: TrainState,
        outcome: Outcome,
        *,
        learning_rate: float,
        gradient_norm: float,
        gpus: Tensor,
        tokens: int,
        seconds: float,
        ended: str,
    ) -> None:
        """Add the line of the step that led to `state` and ended at `ended` (line_time). `gpus` is the ranks'
        sum of gpu.as_vector."""
        self._speed.append((tokens, seconds))
        if self.uploader:
            assert outcome.load is not None
            step = state.steps - 1
            line = StepLine(
                **self._position(state),
                time=ended,
                kind=self._stage.plan.kind(step),
                loss=outcome.loss,
                loss_by_span=outcome.cross_entropy,
                targets=outcome.tokens,
                learning_rate=learning_rate,
                gradient_norm=gradient_norm,
                seconds=seconds,
                tokens_per_second=self._tokens_per_second(),
                router=router_load(outcome.load),
                exercises=self._stage.plan.exercises(step),
                gpu=use_of_ranks(gpus),
                measures=outcome.measures,
                of_kind=self._stage.step_metrics(),
            )
            self._lines.append(line)
            self._context.board.metrics.record([Sample(pod_metrics.TOKENS, tokens)])

    def log_skipped(self, state: TrainState, *, tokens: int, seconds: float, ended: str) -> None:
        """Add the line of the step that was skipped and led to `state`, and ended at `ended`."""
        self._speed.append((tokens, seconds))
        skipped = state.skipped[-1]
        if self.uploader:
            log.warning("%s", _why_skipped(skipped))  # once, and not by every rank
            line = SkippedLine(
                **self._position(state),
                time=ended,
                number=skipped.number,
                kind=skipped.kind,
                batch_tokens=skipped.tokens,
                loss=skipped.loss,
                loss_by_rank=skipped.loss_by_rank,
                gradient_norm=skipped.gradient_norm,
                batch=skipped.batch,
                seconds=seconds,
            )
            self._lines.append(line)

    def log_evaluation(
        self, state: TrainState, loss: HeldOutLoss | None, of_kind: Measures | None, seconds: float
    ) -> None:
        """Add the line of an evaluation at `state`, to be written with the step's."""
        if loss:
            log.info(
                "Held-out loss after %d steps: reasoning %s, final %s",
                state.steps,
                loss.held_out.reasoning,
                loss.held_out.final,
            )
        if self.uploader:
            line = EvaluationLine(
                **self._position(state),
                seconds=seconds,
                loss=loss,
                of_kind=of_kind,
            )
            self._lines.append(line)

    def flush(self, state: TrainState, outcome: Outcome | None, collapsed: Sequence[Collapse]) -> None:
        """Report the step that led to `state`: its lines, log, progress and collapsed layers. `outcome` is
        None if it was skipped. Raises what the store refused for good."""
        if not self.uploader:
            return
        self.uploader.check()
        self._write_lines(self.uploader)
        speed = self._tokens_per_second()
        reported: dict[str, float] = {}
        if outcome is not None:
            loss = self._stage.step_loss(state.steps - 1, outcome)
            log.info("%s: %s %.4f, %.0f tokens/s", self.step_of(state), loss.name, loss.value, speed)
            reported = {"loss": loss.value} if loss.reported else {}
        self.uploader.update(
            message=f"Training, {self.step_of(state)}",
            tokens_per_second=speed,
            conditions=self._conditions(
                state,
                *(
                    ProgressCondition(
                        type="RouterCollapse", status="True", reason=found.reason, message=found.message
                    )
                    for found in collapsed[:3]
                ),
            ),
            **reported,
            **self._amounts(state),
        )

    def waiting(self, message: str) -> None:
        """Report that the loop waits. Raises what the store refused for good."""
        if self.uploader:
            self.uploader.check()
            self.uploader.update(message=message)

    def step_of(self, state: TrainState) -> str:
        """The number of the latest step, for people."""
        steps = self._stage.plan.steps
        return f"step {state.steps}" + (f" of {steps}" if steps else "")

    def stopped(self, message: str) -> None:
        """Report the end of an attempt that others follow."""
        if self.uploader:
            self.uploader.finish(message=message)

    def finished(self, state: TrainState) -> None:
        """Report the end of the stage."""
        if self.uploader:
            done = {**self._amounts(state), "tokens": Amount(done=state.tokens, total=state.tokens)}
            self.uploader.finish(state="Succeeded", message=f"Finished after {state.steps} steps", **done)
        log.info("Finished stage %s: %d steps, %d tokens", state.stage, state.steps, state.tokens)

    def _write_lines(self, uploader: ProgressUploader) -> None:
        lines, self._lines = self._lines, []
        uploader.log(*lines)
        for line in lines:
            self._context.board.metrics.record(line.samples())

    def _tokens_per_second(self) -> float:
        return sum(tokens for tokens, _ in self._speed) / sum(seconds for _, seconds in self._speed)

    def _conditions(self, state: TrainState, *found: ProgressCondition) -> tuple[ProgressCondition, ...]:
        """Conditions for the run's status, those of rejected checkpoints first, three of these at most, then
        that of the latest skipped step."""
        rejected = [
            ProgressCondition(type="CheckpointRefused", status="True", reason="Altered", message=message)
            for message in list(self._start.rejected.values())[:3]
        ]
        skipped = [
            ProgressCondition(
                type="StepSkipped", status="True", reason="NonFinite", message=_why_skipped(latest)
            )
            for latest in state.skipped[-1:]
        ]
        return (*rejected, *skipped, *self._stage.conditions(), *found)

    def _amounts(self, state: TrainState) -> dict[str, Any]:
        """The fields of the progress that follow from the state."""
        return {
            "tokens": Amount(done=state.tokens, total=self._stage.plan.total),
            "held_out": held_out_losses(state),
        }


def _why_skipped(skipped: SkippedStep) -> str:
    """What was wrong with the latest skipped step, for people."""
    ranks = [rank for rank, loss in enumerate(skipped.loss_by_rank) if not isinstance(loss, float)]
    where = f" (rank {', '.join(map(str, ranks))})" if ranks else ""
    window = "" if skipped.batch.window is None else f", window {skipped.batch.window},"
    return (
        f"step {skipped.step}{window} was skipped: loss {skipped.loss}{where}, gradient norm "
        f"{skipped.gradient_norm}. No weight moved; the stage has skipped {skipped.number} so far"
    )
