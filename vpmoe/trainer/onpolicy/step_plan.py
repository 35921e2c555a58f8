"""The steps of an OnPolicy stage, on one rank: windows in their order, and between them the anchor steps, which are Vanilla.

How many steps there are is not known ahead: the stage ends with the one that reaches its tokens. Which steps are windows is
vpmoe.rollout.curriculum's business; a window is loaded when it is there, which exchange.py waits for.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.stages import OnPolicy
from vpmoe.checkpoint.train_state import TrainState
from vpmoe.data import packing
from vpmoe.data.mixture import as_written
from vpmoe.data.reader import DatasetReader
from vpmoe.failure import Permanent
from vpmoe.model.batch import Batch
from vpmoe.rollout import policy_version
from vpmoe.rollout.curriculum import Curriculum
from vpmoe.storage import paths
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.data.loader import Stream, plan_of
from vpmoe.trainer.onpolicy import window_batch
from vpmoe.trainer.onpolicy.window_batch import Due, Window


class OnPolicyCourse:
    """The steps of one stage."""

    steps = None
    """Not known ahead."""

    def __init__(
        self,
        task: StageContext,
        parts: DatasetReader,
        start: TrainState,
        *,
        sequences_per_step: int,
        seed: int,
        sequence_length: int,
        rank: int,
        ranks: int,
    ) -> None:
        """`start` says where the stage began. Raises Permanent where there is nothing to train on, or no step would be a window."""
        assert isinstance(task.stage, OnPolicy)
        self._task = task
        self._parts = parts
        self._each = sequences_per_step
        self._rank, self._ranks = rank, ranks
        self.curriculum = Curriculum(task.stage)
        self._anchor = as_written(task.stage.anchor)
        self.total = task.stage.tokens
        """Tokens by which the learning rate goes."""
        self._plan = plan_of(parts, seed, sequence_length)
        self.anchors: NDArray[np.int64] = self._plan.steps(
            start.first_sequence, sequences_per_step, task.stage.tokens
        )
        """Tokens of the stage's first anchor steps together, after each of them."""
        self._stream = Stream(
            parts, self._plan, start.first_sequence, sequences_per_step, len(self.anchors), rank, ranks
        )
        self._first_document = packing.firsts([len(part) for part in parts.lengths])
        self._window: Window | None = None
        self._published: tuple[int, str] | None = None

    def load(self, position: TrainState) -> Window:
        """Read the window that the next step trains. Raises Permanent where the one in the bucket is not that one."""
        assert position.windows is not None
        number = position.windows.trained
        due = Due(
            run=self._task.provenance.run,
            config=self._task.provenance.config,
            stage=position.stage,
            window=number,
            version=self.curriculum.version_of(number),
            weights=self._weights(self.curriculum.version_of(number)),
            seen=position.tokens,
            last_from=self.total - self.curriculum.after(number, position.tokens, 0, self.anchors),
        )
        self._window = window_batch.read(self._task.bucket, self._task.run, due, self._plan.sequence_length)
        return self._window

    def goes_on(self, position: TrainState) -> bool:
        """Whether a window follows, once a window or nothing has been trained."""
        assert position.windows is not None
        trained = position.windows.trained
        reached = (
            self.curriculum.after(trained - 1, position.tokens, 0, self.anchors)
            if trained
            else position.tokens
        )
        return reached < self.total

    def batches(self, step: int) -> list[Batch]:
        """This rank's microbatches of a step (from 0); of a window's the one that was loaded."""
        if not self.curriculum.is_window(step):
            return self._stream.batches(self._anchors_before(step))
        return window_batch.batches(self._loaded(step), self._plan.sequence_length, self._rank, self._ranks)

    def kind(self, step: int) -> str:
        """How a step trains."""
        return "OnPolicy" if self.curriculum.is_window(step) else "Vanilla"

    def exercises(self, step: int) -> dict[str, float]:
        """Share of each exercise in the whole step, all ranks together, by tokens; a rollout is of its prompt's exercise."""
        if not self.curriculum.is_window(step):
            return self._stream.exercises(self._anchors_before(step))
        rollouts = self._loaded(step).rollouts
        numbers = np.array([one.document for one in rollouts], np.int32)
        asked = packing.documents(numbers, self._first_document, self._parts.lengths)
        return self._parts.exercise_shares(
            document._replace(length=len(one.ids_T)) for document, one in zip(asked, rollouts, strict=True)
        )

    def after(self, position: TrainState) -> dict[str, Any]:
        """What of the position says where the data stand, once the step at `position` is done."""
        step, stream = position.steps, position.windows
        assert stream is not None
        if self.curriculum.is_window(step):
            assert isinstance(self._task.stage, OnPolicy)
            chain = hashlib.sha256("".join((stream.digest, *self._loaded(step).sha256)).encode()).hexdigest()
            prompts = stream.next_prompt + self._task.stage.rollout.prompts_per_window
            stream = stream.model_copy(
                update={"trained": stream.trained + 1, "next_prompt": prompts, "digest": chain}
            )
        ahead = position.first_sequence + self._anchors_before(step + 1) * self._each
        return {"next_sequence": ahead, "epoch": self._plan.locate(ahead)[0], "windows": stream}

    def _anchors_before(self, step: int) -> int:
        return int(step * self._anchor)

    def _loaded(self, step: int) -> Window:
        assert self._window is not None and self.curriculum.step_of(self._window.sampled.about.window) == step
        return self._window

    def _weights(self, number: int) -> str:
        """The content of a version; windows in a row ask for the same."""
        if self._published is None or self._published[0] != number:
            run, stage, bucket = self._task.run, self._task.stage.name, self._task.bucket
            found = policy_version.find(bucket, run, stage, number)
            if found is None:
                where = bucket.url(paths.manifest(paths.weights(run, stage, number)))
                raise Permanent(
                    f"{where}: the version's manifest is gone, and a window that was sampled from it is to be trained. Restore it, or "
                    f"delete {bucket.url(paths.checkpoints(run, stage))}, the stage's weights and its rollouts to train it anew."
                )
            self._published = (number, policy_version.content_of(found[0]))
        return self._published[1]
