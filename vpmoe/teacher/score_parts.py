"""Scores of parts: the teacher scores finished rollouts of a policy version while others still grow.

A worker scores the rollouts of its own windows in each part, and writes them beside the part, in an object
that names the part's hash. When a window is written, it takes the scores of the window's rollouts from there.
A restarted worker reads what earlier attempts have written. part_files.py (vpmoe.rollout) describes
the files.
"""

import logging
import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vpmoe.failure import Permanent
from vpmoe.rollout.curriculum import Curriculum
from vpmoe.rollout.part_files import (
    Part,
    PartScoresHeader,
    RolloutKey,
    list_parts,
    part_scores_bytes,
    read_part,
    read_part_scores,
)
from vpmoe.rollout.window_files import Rollout, WindowRollouts
from vpmoe.storage import StorageError, paths
from vpmoe.teacher.rescore import Teacher
from vpmoe.teacher.scoring_worker import ScoringWorker, check_rollouts, score_rollouts

log = logging.getLogger(__name__)


class ScoredRollout(NamedTuple):
    """A rollout of a part with its scores."""

    rollout: Rollout
    logp_C: NDArray[np.float32]
    seconds: float
    """Its share of the time that scoring the part took; 0 if an earlier attempt scored it."""


class PartScorer:
    """Scores the parts of one version after the other."""

    def __init__(self, job: ScoringWorker, teacher: Teacher) -> None:
        self.seconds = 0.0
        """Time spent on parts so far."""
        self._job, self._teacher = job, teacher
        self._curriculum = Curriculum(job.stage)
        self._version = -1
        self._read: set[int] = set()
        """Parts of the version whose scores are in `_scored`."""
        self._scored: dict[RolloutKey, ScoredRollout] = {}

    def score_next(self, window: int) -> bool:
        """Score the next part of the version that samples `window`, leaving out windows before it.

        Returns False if there is none. Raises StorageError if a part was altered, Permanent if it is of
        another run, or if its scores are uniform or no numbers.
        """
        unread = self._unread_parts(window)
        if unread:
            self._score(unread[0], window)
        return bool(unread)

    def scores_of(self, sampled: WindowRollouts) -> dict[RolloutKey, ScoredRollout]:
        """The rollouts of a window that were scored in parts, by this attempt or earlier ones.

        Raises as `score_next`.
        """
        window = sampled.header.window
        wanted = {RolloutKey(window, one.prompt, one.rollout): one for one in sampled.rollouts}
        if wanted.keys() - self._scored.keys():
            for number in self._unread_parts(window):
                if self._job.bucket.exists(self._scores_key(number)):
                    self._adopt(self._part(number))
        found = {key: self._scored[key] for key in wanted if key in self._scored}
        same = {
            key: one for key, one in found.items() if np.array_equal(one.rollout.ids_T, wanted[key].ids_T)
        }
        if len(same) < len(found):
            log.warning(
                f"Window {window}: {len(found) - len(same)} of its rollouts have other ids than in the parts "
                f"of version {self._version}; scoring them again"
            )
        return same

    def _unread_parts(self, window: int) -> list[int]:
        """The parts of the version that samples `window` whose scores this attempt does not know."""
        version = self._curriculum.version_of(window)
        if version != self._version:
            self._version, self._read, self._scored = version, set(), {}
        job = self._job
        return [
            number
            for number in list_parts(job.bucket, job.run, job.stage.name, version)
            if number not in self._read
        ]

    def _part(self, number: int) -> Part:
        job = self._job
        key = paths.part(job.run, job.stage.name, self._version, number)
        expected = {
            "run": job.provenance.run,
            "config": job.run.config_hash,
            "stage": job.stage.name,
            "version": self._version,
            "part": number,
        }
        part = read_part(job.bucket, key, expected)
        check_rollouts(job, key, part.rollouts.values())
        return part

    def _score(self, number: int, window: int) -> None:
        """Score a part from `window` on, unless an earlier attempt did."""
        started, job = time.monotonic(), self._job
        part = self._part(number)
        mine = {
            key: one for key, one in part.rollouts.items() if key.window >= window and job.owns(key.window)
        }
        if self._adopt(part) or not mine:
            self._read.add(number)
            return
        logp = score_rollouts(job, self._teacher, mine, f"part {number} of version {self._version}")
        seconds, tokens = time.monotonic() - started, sum(len(one.ids_T) for one in mine.values())
        header = PartScoresHeader(
            run=job.provenance.run,
            stage=job.stage.name,
            version=self._version,
            part=number,
            worker=job.worker or 0,
            rollouts=part.sha256,
            teacher=job.teacher,
        )
        data = part_scores_bytes(header, logp)
        if not job.bucket.create(self._scores_key(number), data, job.provenance.metadata()):
            log.info("Part %d: another attempt has written scores with other bits; keeping them", number)
        for key, one in mine.items():
            self._scored[key] = ScoredRollout(one, logp[key], seconds * len(one.ids_T) / tokens)
        self._read.add(number)
        self.seconds += seconds
        log.info(
            f"Scored part {number} of version {self._version}: {len(mine):,} rollouts, {tokens:,} tokens in "
            f"{seconds:,.1f} s"
        )
        job.report_windows(f"Scored part {number} of version {self._version}", tokens / seconds)

    def _adopt(self, part: Part) -> bool:
        """Take the scores of a part from the bucket; returns whether there are any.

        Scores of another content, or damaged ones, are deleted with a warning: the part is scored again.
        """
        job, number = self._job, part.header.part
        key = self._scores_key(number)
        if not job.bucket.exists(key):
            return False
        try:
            logp = read_part_scores(job.bucket.get(key), job.bucket.url(key), part, job.teacher)
        except (Permanent, StorageError) as error:
            if isinstance(error, StorageError) and error.reason != "Altered":
                raise
            log.warning("%s Scoring its rollouts again.", error)
            job.bucket.delete(key)
            return False
        self._scored |= {each: ScoredRollout(part.rollouts[each], one, 0.0) for each, one in logp.items()}
        self._read.add(number)
        return True

    def _scores_key(self, number: int) -> str:
        job = self._job
        return paths.part_scores(job.run, job.stage.name, self._version, number, job.worker or 0)
