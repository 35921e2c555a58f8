"""A worker of the step that scores an OnPolicy stage: which windows are its own, reading their rollouts, and
scoring rollouts with the teacher.

score_windows.py scores whole windows with it, score_parts.py the rollouts that are finished before.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.stages import OnPolicy
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.failure import Permanent
from vpmoe.process.gpu import ReadGpus, not_read
from vpmoe.process.step_worker import StepWorker, step_succeeded
from vpmoe.rollout.part_files import RolloutKey
from vpmoe.rollout.window_files import Rollout, WindowRollouts, foreign_rollouts, read_rollouts
from vpmoe.storage import paths
from vpmoe.teacher.rescore import Teacher
from vpmoe.teacher.uniform import UniformCheck

NAME = re.compile(r"window-(\d+)\.(rollouts|scores)\.arrow")


@dataclass(frozen=True)
class ScoringWorker(StepWorker):
    """One worker of one attempt at scoring a stage."""

    stage: OnPolicy
    teacher: str
    """ModelRef.sha256 of the run's teacher."""
    read_gpus: ReadGpus = not_read
    sampled: set[int] = field(default_factory=set)
    """Windows known to have rollouts."""
    scored: set[int] = field(default_factory=set)
    """Windows known to have scores, from all workers."""
    last: dict[int, bool] = field(default_factory=dict)
    """For each window that was read, whether it is the stage's last."""

    @property
    def workers(self) -> int:
        """Number of workers that share the windows; 1 if this process is not one of an Indexed Job."""
        return 1 if self.worker is None else self.run.spec.teacher.gpus

    def owns(self, window: int) -> bool:
        """Whether this worker scores the window."""
        return window % self.workers == (self.worker or 0)

    def key(self, window: int, kind: Literal["rollouts", "scores"]) -> str:
        return paths.window(self.run, self.stage.name, window, kind)

    def refresh(self) -> None:
        """Update `sampled` and `scored` from the bucket.

        Lists only from the first window without scores on.
        """
        whole = next(window for window in count() if window not in self.scored)
        folder = self.key(0, "scores").rpartition("/")[0]
        for found in self.bucket.list(f"{folder}/window-", self.key(whole - 1, "scores") if whole else ""):
            if named := NAME.search(found.key):
                (self.scored if named[2] == "scores" else self.sampled).add(int(named[1]))

    def stage_finished(self) -> bool:
        """Whether training of the stage has finished, so that no more scores are needed."""
        return step_succeeded(self.run, self.bucket, self.stage.name)

    def after_last_window(self, window: int) -> bool:
        """Whether the stage ends before this window.

        If so, its last window is among the `workers` windows before.
        """
        return any(self._is_last(before) for before in range(max(0, window - self.workers), window))

    def _is_last(self, window: int) -> bool:
        if window not in self.last and self.bucket.exists(self.key(window, "rollouts")):
            read_window(self, window)
        return self.last.get(window, False)

    def report_windows(self, message: str, speed: float | None = None) -> None:
        """Report progress. The first worker reports for all."""
        if not self.worker:
            self.refresh()
            self.report(message, len(self.scored), len(self.sampled), speed)


def read_window(job: ScoringWorker, window: int) -> WindowRollouts:
    """A window's rollouts. Raises Permanent if they are damaged, of another run, or cannot be scored."""
    key = job.key(window, "rollouts")
    sampled = read_rollouts(job.bucket.get(key), job.bucket.url(key))
    ours = {
        "run": job.provenance.run,
        "config": job.run.config_hash,
        "stage": job.stage.name,
        "window": window,
    }
    for name, value in ours.items():
        if getattr(sampled.header, name) != value:
            raise foreign_rollouts(
                job.bucket.url(key), f"{name} is {getattr(sampled.header, name)} there and {value} here"
            )
    check_rollouts(job, key, sampled.rollouts)
    if len({(one.prompt, one.rollout) for one in sampled.rollouts}) < len(sampled.rollouts):
        raise foreign_rollouts(job.bucket.url(key), "it has a rollout twice")
    job.last[window] = sampled.header.last
    return sampled


def check_rollouts(job: ScoringWorker, key: str, rollouts: Iterable[Rollout]) -> None:
    """Raise Permanent if rollouts of the object `key` cannot be scored."""
    longest = job.run.spec.training.sequence_length
    for one in rollouts:
        which = f"rollout {one.rollout} of prompt {one.prompt}"
        if not 0 < len(one.logp_C) < len(one.ids_T) <= longest:
            tokens = f"{len(one.ids_T)} tokens, {len(one.logp_C)} of them sampled"
            raise foreign_rollouts(job.bucket.url(key), f"{which} has {tokens}; sequenceLength is {longest}")
        if not 0 <= one.ids_T.min() <= one.ids_T.max() < VOCABULARY_SIZE:
            raise foreign_rollouts(
                job.bucket.url(key), f"{which} has ids from {one.ids_T.min()} to {one.ids_T.max()}"
            )


def score_rollouts(
    job: ScoringWorker, teacher: Teacher, rollouts: Mapping[RolloutKey, Rollout], where: str
) -> dict[RolloutKey, NDArray[np.float32]]:
    """For each rollout the teacher's log-probabilities of its completion, [C], given the same prompt as the
    student's.

    The prompt keeps its effort. `where`: what they are of, for errors. Raises Permanent if a token has no
    log-probability, or if all so far are uniform.
    """
    found = {}
    uniform = UniformCheck(where)
    scores = teacher.score((one.ids_T for one in rollouts.values()), job.check_stop)
    for (key, one), logp_T in zip(rollouts.items(), scores, strict=True):
        logp_C = logp_T[one.prompt_length :]
        missing = np.flatnonzero(np.isnan(logp_C))
        if len(missing):
            raise Permanent(
                f"teacher.model: rollout {key.rollout} of prompt {key.prompt} of window {key.window}: the "
                f"teacher gave {len(missing)} of its tokens no probability, the first at {missing[0]} of "
                f"{len(logp_C)}. Its weights may hold numbers that are not finite, or overflow in their "
                "dtype; try another checkpoint."
            )
        uniform.add(logp_C)
        found[key] = logp_C
    return found
