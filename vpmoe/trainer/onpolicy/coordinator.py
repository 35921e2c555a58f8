"""Coordinates an OnPolicy stage: the one owner of the window that is being trained.

Steps are windows in their order, with Vanilla anchor steps between them (vpmoe/rollout/curriculum.py). How
many steps there are is not known ahead: the stage ends with the step that reaches its tokens. Before the step
of a window the coordinator waits for the window and reads it. After a step it publishes the policy version
that is due, and before that makes an adjustment if the trainer has starved.
"""

import logging
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.microbatch import Microbatch
from vpmoe.api.progress import ProgressCondition
from vpmoe.api.stages import OnPolicy
from vpmoe.checkpoint.train_state import StepBatch, TrainState, WindowStream
from vpmoe.data import packing
from vpmoe.data.mixture import exact_share
from vpmoe.data.packing import PackedDocument
from vpmoe.data.reader import DatasetReader
from vpmoe.model import distributed
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner, Outcome
from vpmoe.objectives.onpolicy import OnPolicyMeasures
from vpmoe.rollout import back_pressure
from vpmoe.rollout.curriculum import Curriculum
from vpmoe.rollout.validity import VALID
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.data.loader import Stream, plan_of
from vpmoe.trainer.onpolicy import starvation, window_batch, window_stats
from vpmoe.trainer.onpolicy.publisher import Publisher
from vpmoe.trainer.onpolicy.starvation import Starvation
from vpmoe.trainer.onpolicy.window_batch import DueWindow, ScoredWindow
from vpmoe.trainer.onpolicy.window_metrics import WindowMetrics, window_metrics
from vpmoe.trainer.onpolicy.window_wait import Waits, WindowFile, WindowWait

log = logging.getLogger(__name__)


class OnPolicyCoordinator:
    """One attempt at a stage, on one rank, and the stage's StepPlan. Every rank has a coordinator; rank 0
    writes."""

    steps = None

    def __init__(
        self,
        context: StageContext,
        stage: OnPolicy,
        documents: DatasetReader,
        start: TrainState,
        publisher: Publisher,
        *,
        sequences_per_step: int,
        microbatch: Microbatch,
    ) -> None:
        """`start` is the stage's state. Raises Permanent if there is nothing to train on, or no step would
        be a window."""
        training = context.run.spec.training
        self._context = context
        self._stage = stage
        self._documents = documents
        self._publisher = publisher
        self._each = sequences_per_step
        self._microbatch = microbatch
        self._rank, self._ranks = distributed.rank(), distributed.world_size()
        self._sequence_length = training.sequence_length
        self.curriculum = Curriculum(stage)
        self.total = stage.tokens
        self._anchor_share = exact_share(stage.anchor)
        self._plan = plan_of(documents, training.seed, training.sequence_length)
        self.anchors: NDArray[np.int64] = self._plan.tokens_after_steps(
            start.first_sequence, sequences_per_step, stage.tokens
        )
        """Tokens of the stage's first anchor steps together, after each of them."""
        first, steps = start.first_sequence, len(self.anchors)
        self._stream = Stream(
            documents, self._plan, first, sequences_per_step, steps, self._rank, self._ranks, microbatch
        )
        self._first_document = packing.first_documents([len(part) for part in documents.lengths])
        self._wait = WindowWait(context)
        self._starvation = Starvation(stage.back_pressure.windows)
        self._adjustments = (
            back_pressure.read_adjustments(context.bucket, context.run, stage.name) if self._rank == 0 else []
        )
        self._window: ScoredWindow | None = None
        """The window of the step at hand; None in an anchor step."""
        self._waits = Waits(0.0, 0.0)
        self._wait_upload = 0.0
        """Seconds that training waited after its step for the upload of the version before."""

    def kind(self, step: int) -> str:
        """See StepPlan."""
        return "OnPolicy" if self.curriculum.is_window(step) else "Vanilla"

    def load_window(self, state: TrainState, waiting: Callable[[str], None]) -> bool:
        """Wait for the window of the step at `state` and read it; an anchor step has none. Every rank calls
        it.

        Returns False if any rank was asked to stop first. `waiting` is called about once a second with
        what is missing. Raises Permanent if the window in the bucket is not the one that is due.
        """
        self._window, self._waits, self._wait_upload = None, Waits(0.0, 0.0), 0.0
        if not self.curriculum.is_window(state.steps):
            return True
        number = _stream_of(state).trained

        def missing(file: WindowFile) -> None:
            self._publisher.check()
            waiting(f"Waiting for the {file} of window {number}")

        waits = self._wait.wait(number, missing)
        if waits is None:
            return False
        self._waits, self._window = waits, self._read(state, number)
        return True

    def batches(self, step: int) -> list[Batch]:
        """See StepPlan. Of a window's step those of the window that was loaded."""
        if not self.curriculum.is_window(step):
            return self._stream.batches(self._anchors_before(step))
        return window_batch.window_batches(
            self._loaded(step), self._sequence_length, self._rank, self._ranks, self._microbatch
        )

    def exercises(self, step: int) -> dict[str, float]:
        """See StepPlan. A rollout is of its prompt's exercise."""
        if not self.curriculum.is_window(step):
            return self._stream.exercises(self._anchors_before(step))
        asked, rollouts = self._prompts(step), self._loaded(step).rollouts
        return self._documents.exercise_shares(
            document._replace(length=len(one.ids_T)) for document, one in zip(asked, rollouts, strict=True)
        )

    def describe(self, step: int) -> StepBatch:
        """See StepPlan."""
        if not self.curriculum.is_window(step):
            return self._stream.describe(self._anchors_before(step))
        return StepBatch(
            documents=self._documents.numbers_by_part(self._prompts(step)),
            window=self._loaded(step).sampled.header.window,
        )

    def record_window(self, state: TrainState, outcome: Outcome) -> TrainState:
        """The state with what the forward of a window has measured. Raises Permanent if the sampler has
        drifted for too long."""
        if self._window is None:
            return state
        measures, stream, rollouts = outcome.measures, _stream_of(state), self._window.rollouts
        assert isinstance(measures, OnPolicyMeasures)
        kl = window_stats.sampler_kl(measures, outcome.tokens)
        above = window_stats.windows_above_bound(
            stream.beyond, kl, self._stage.max_sampler_kl, stream.trained
        )
        valid = sum(one.validity == VALID for one in rollouts)
        stats = window_stats.add_window(
            stream.since, len(rollouts), valid, outcome.tokens, measures.reverse_kl
        )
        return _with_stream(state, stream.model_copy(update={"beyond": above, "since": stats}))

    def advance(self, state: TrainState) -> TrainState:
        """See StepPlan."""
        stream = _stream_of(state)
        if self.curriculum.is_window(state.steps):
            digest = window_batch.chained_digest(stream.digest, self._loaded(state.steps))
            next_prompt = stream.next_prompt + self._stage.rollout.prompts_per_window
            stream = stream.model_copy(
                update={"trained": stream.trained + 1, "next_prompt": next_prompt, "digest": digest}
            )
        next_sequence = state.first_sequence + self._anchors_before(state.steps + 1) * self._each
        epoch = self._plan.locate(next_sequence)[0]
        return _with_stream(state.model_copy(update={"next_sequence": next_sequence, "epoch": epoch}), stream)

    def add_seconds(self, seconds: float) -> None:
        """Count the time of the step at hand, waiting included, towards starvation."""
        if self._window is None:
            self._starvation.add_anchor(seconds)
        else:
            self._starvation.add_window(sum(self._waits), seconds)

    def publish_due(self, learner: Learner, state: TrainState) -> None:
        """Publish the version that is due at `state`, if one is and it does not exist. Every rank calls it.

        An adjustment is written before the version, so every sampler of the version finds it.
        """
        version = _stream_of(state).trained
        every, staleness = self._stage.publish_every, self._stage.staleness
        oldest = version - staleness - every + 1
        due = version % every == 0 and state.steps == self.curriculum.steps_trained(version)
        if due and self._window_follows(state) and not self._publisher.exists(version):
            self._adjust(version + staleness)
            self._wait_upload = self._publisher.publish(learner, state, oldest)
        self._publisher.prune(oldest)

    def evaluate(self, state: TrainState, weights: Mapping[str, float]) -> TrainState:
        """The state with the reverse KL and validity of the windows since the evaluation before; unchanged if
        there was none."""
        return _with_stream(state, window_stats.close_window_stats(_stream_of(state), weights))

    def metrics(self) -> WindowMetrics | None:
        """Of the window of the step at hand; None of an anchor step. Rank 0 calls it."""
        if self._window is None:
            return None
        most = self._stage.staleness + self._stage.publish_every
        ahead = self._wait.buffer(self._window.sampled.header.window + 1, most)
        return window_metrics(self._window, self._waits, self._wait_upload, ahead)

    def conditions(self) -> list[ProgressCondition]:
        """Conditions for the run's status: the latest adjustment."""
        return [starvation.starvation_condition(latest) for latest in self._adjustments[-1:]]

    def finish(self, early: bool) -> None:
        """Return once every version is published. After a stage that did not end `early` no version is needed
        any more."""
        self._publisher.wait()
        self._publisher.empty_volume()
        if not early:
            self._publisher.prune(1 << 62)

    def _read(self, state: TrainState, number: int) -> ScoredWindow:
        version = self.curriculum.version_of(number)
        due = DueWindow(
            run=self._context.provenance.run,
            config=self._context.provenance.config,
            stage=state.stage,
            window=number,
            version=version,
            weights=self._publisher.content(version),
            seen=state.tokens,
            last_from=self.total - self.curriculum.tokens_before_next(number, state.tokens, 0, self.anchors),
        )
        return window_batch.read_window(self._context.bucket, self._context.run, due, self._sequence_length)

    def _loaded(self, step: int) -> ScoredWindow:
        assert (
            self._window is not None and self.curriculum.step_of(self._window.sampled.header.window) == step
        )
        return self._window

    def _prompts(self, step: int) -> list[PackedDocument]:
        """The document of each rollout's prompt, of a window's step."""
        numbers = np.array([one.document for one in self._loaded(step).rollouts], np.int32)
        return packing.packed_documents(numbers, self._first_document, self._documents.lengths)

    def _anchors_before(self, step: int) -> int:
        return int(step * self._anchor_share)

    def _window_follows(self, state: TrainState) -> bool:
        """Whether the stage has another window. `state` is the stage's begin, or that after a window's
        step."""
        trained, reached = _stream_of(state).trained, state.tokens
        if trained:
            reached = self.curriculum.tokens_before_next(trained - 1, reached, 0, self.anchors)
        return reached < self.total

    def _adjust(self, first: int) -> None:
        """Make the next adjustment for the windows from `first` on, if the trainer has starved."""
        bucket, run, name = self._context.bucket, self._context.run, self._stage.name
        adjustment = starvation.next_adjustment(
            self._adjustments, self._starvation.share, self._stage.back_pressure.waiting, first
        )
        if self._rank == 0 and adjustment is not None:
            back_pressure.write_adjustment(bucket, run, name, adjustment, self._context.provenance.metadata())
            self._adjustments = back_pressure.read_adjustments(bucket, run, name)
            self._starvation.reset()
            log.warning("%s", starvation.starvation_condition(self._adjustments[-1]).message)


def _stream_of(state: TrainState) -> WindowStream:
    assert state.windows is not None, "an OnPolicy stage begins with a stream of windows"
    return state.windows


def _with_stream(state: TrainState, stream: WindowStream) -> TrainState:
    return state.model_copy(update={"windows": stream})
