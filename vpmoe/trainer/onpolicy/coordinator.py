"""What the trainer of an OnPolicy stage has to do with its sampler and teacher, by way of the bucket alone.

Before a window's step it waits for the window, after it it publishes the version that is due and, where it starves, turns a knob first; on
the way it looks whether the sampler computes the same student. Each of these is a module of its own: waiting, publish, pressure.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from vpmoe.api.progress import ProgressCondition
from vpmoe.api.stages import OnPolicy
from vpmoe.checkpoint.train_state import TrainState, WindowStats
from vpmoe.data.spans import SPANS
from vpmoe.model import distributed
from vpmoe.model.learner import Learner, Outcome
from vpmoe.rollout import back_pressure
from vpmoe.rollout.prompts import VALID
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.onpolicy import starvation, window_batch
from vpmoe.trainer.onpolicy.publisher import Publisher
from vpmoe.trainer.onpolicy.starvation import Starvation
from vpmoe.trainer.onpolicy.step_plan import OnPolicyCourse
from vpmoe.trainer.onpolicy.window_batch import Window
from vpmoe.trainer.onpolicy.window_wait import Kind, Waiting, Waits, buffer

log = logging.getLogger(__name__)


class Exchange:
    """One attempt's share in it. Every rank makes one; rank 0 writes."""

    def __init__(self, task: StageContext, course: OnPolicyCourse, publisher: Publisher) -> None:
        assert isinstance(task.stage, OnPolicy)
        self._task = task
        self._stage = task.stage
        self._course = course
        self._publisher = publisher
        self._waiting = Waiting(task)
        self._starvation = Starvation(task.stage.back_pressure.windows)
        self._turns = (
            back_pressure.read(task.bucket, task.run, task.stage.name) if distributed.rank() == 0 else []
        )
        self._window: Window | None = None
        self._waits = Waits(0.0, 0.0)

    def ready(self, position: TrainState, meanwhile: Callable[[str], None]) -> bool:
        """Wait for what the next step trains and load it; False where any rank was asked to stop first. Every rank calls it.

        `meanwhile` hears about once a second, in words, what is waited for.
        """
        self._window, self._waits = None, Waits(0.0, 0.0)
        if not self._course.curriculum.is_window(position.steps):
            return True
        assert position.windows is not None
        number = position.windows.trained

        def waiting(missing: Kind) -> None:
            self.check()
            meanwhile(f"Waiting for the {missing} of window {number}")

        waits = self._waiting.wait(number, waiting)
        if waits is None:
            return False
        self._waits, self._window = waits, self._course.load(position)
        return True

    def judge(self, position: TrainState, outcome: Outcome) -> TrainState:
        """The position with what a window's forward has shown. Raises Permanent where the sampler has drifted for long."""
        if self._window is None:
            return position
        assert position.windows is not None
        stream, since, gap = position.windows, position.windows.since, outcome.facts["reverseKl"]
        kl = starvation.sampler_kl(outcome.facts["samplerKl"], outcome.tokens)
        valid = sum(one.validity == VALID for one in self._window.rollouts)
        return position.model_copy(
            update={
                "windows": stream.model_copy(
                    update={
                        "beyond": starvation.beyond(
                            stream.beyond, kl, self._stage.max_sampler_kl, stream.trained
                        ),
                        "since": WindowStats(
                            rollouts=since.rollouts + len(self._window.rollouts),
                            valid=since.valid + valid,
                            gap={
                                span: since.gap.get(span, 0.0) + (gap[span] or 0.0) * outcome.tokens[span]
                                for span in SPANS
                            },
                            tokens={span: since.tokens.get(span, 0) + outcome.tokens[span] for span in SPANS},
                        ),
                    }
                )
            }
        )

    def evaluate(self, position: TrainState, weights: Mapping[str, float]) -> TrainState:
        """The position with what the windows since the evaluation before came to, for `stop`; as it is where there was none."""
        stream = position.windows
        assert stream is not None
        since = stream.since
        if not since.rollouts:
            return position
        whole = sum(weights[span] * since.gap[span] / max(since.tokens[span], 1) for span in SPANS)
        changes = {
            "since": WindowStats(),
            "reverse_kl": (*stream.reverse_kl, whole),
            "validity": since.valid / since.rollouts,
        }
        return position.model_copy(update={"windows": stream.model_copy(update=changes)})

    def publish(self, learner: Learner, position: TrainState) -> None:
        """Publish the version that is due where the stage stands, if one is and nobody has. Every rank calls it.

        Where the trainer has starved a knob is turned first: whoever samples from the version finds the turn.
        """
        stream, curriculum = position.windows, self._course.curriculum
        assert stream is not None
        number = stream.trained
        due = number % self._stage.publish_every == 0 and position.steps == curriculum.published_after(number)
        if due and self._course.goes_on(position) and not self._publisher.exists(number):
            self._turn(number + self._stage.staleness)
            self._publisher.publish(learner, position)
        self._publisher.prune(number - self._stage.staleness - self._stage.publish_every + 1)

    def took(self, seconds: float) -> None:
        """The step that was made ready took so long, its waiting included."""
        if self._window is None:
            self._starvation.anchor(seconds)
        else:
            self._starvation.window(sum(self._waits), seconds)

    def facts(self) -> dict[str, Any]:
        """What the step's line of metrics says of its window; nothing of an anchor step. Rank 0 asks."""
        if self._window is None:
            return {}
        held = window_batch.facts(self._window)
        most = self._stage.staleness + self._stage.publish_every
        return {
            **held,
            "waitRollouts": self._waits.rollouts,
            "waitScores": self._waits.scores,
            "buffer": buffer(self._task, held["window"] + 1, most),
        }

    def conditions(self) -> list[ProgressCondition]:
        """What the run's status should say: the latest turn."""
        return [starvation.starved(turn) for turn in self._turns[-1:]]

    def finish(self, early: bool) -> None:
        """Return once everything is published. Of a stage that went to its end no version is needed any more."""
        self._publisher.wait()
        if not early:
            self._publisher.prune(1 << 62)

    def wait(self) -> None:
        """Return once the version being uploaded exists: a checkpoint must not, before it does."""
        self._publisher.wait()

    def check(self) -> None:
        """Raise what made an upload fail, if one did; does not wait."""
        self._publisher.check()

    def _turn(self, first: int) -> None:
        """Turn the next knob for the windows from `first` on, if it is time to."""
        turn = starvation.next_turn(
            self._turns, self._starvation.share, self._stage.back_pressure.waiting, first
        )
        if distributed.rank() == 0 and turn is not None:
            back_pressure.write(
                self._task.bucket, self._task.run, self._stage.name, turn, self._task.provenance.metadata()
            )
            self._turns = back_pressure.read(self._task.bucket, self._task.run, self._stage.name)
            self._starvation.forget()
            log.warning("%s", starvation.starved(self._turns[-1]).message)
