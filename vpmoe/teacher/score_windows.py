"""The teacher of an OnPolicy stage: scores the sampled tokens of every window, as windows appear.

Worker w of W scores the windows k ≡ w (mod W), in order, each into one object that is written once. A
restarted worker continues with its first window without scores. The teacher is loaded at the start and not
when the first window appears, because meanwhile the sampler loads the student and samples that window. The
files are described in vpmoe.rollout.window_files.
"""

import json
import logging
import re
import threading
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vpmoe.api import DistillRun
from vpmoe.api.metrics import MetricsLine
from vpmoe.api.stages import OnPolicy
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.failure import Permanent
from vpmoe.process.board import ProgressBoard
from vpmoe.process.gpu import GpuUse, ReadGpus, not_read
from vpmoe.process.step_worker import StepWorker, step_succeeded
from vpmoe.provenance import Provenance
from vpmoe.rollout.gate import require_validity
from vpmoe.rollout.window_files import ScoresHeader, WindowRollouts, read_rollouts, read_scores, scores_bytes
from vpmoe.storage import Bucket, paths
from vpmoe.teacher import model
from vpmoe.teacher.rescore import LoadTeacher, Teacher
from vpmoe.teacher.uniform import UniformCheck

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Seconds between two checks for the next window."""

REPORT_SECONDS = 10.0
"""Seconds between reports while waiting for a window."""

NAME = re.compile(r"window-(\d+)\.(rollouts|scores)\.arrow")


class ScoringLine(MetricsLine):
    """The teacher's line of metrics for a window."""

    event: str = "window"
    worker: int
    window: int
    seconds: float
    """Time to read and score the window."""
    wait_rollouts: float
    """Seconds that the worker waited for the window."""
    tokens: int
    """Tokens of the window: prompts and completions."""
    tokens_per_second: float
    gpu: GpuUse
    """While the window was scored."""


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


def score_windows(
    run: DistillRun,
    stage: OnPolicy,
    bucket: Bucket,
    provenance: Provenance,
    stopping: threading.Event,
    board: ProgressBoard,
    worker: int | None,
    load_teacher: LoadTeacher,
    scratch: Path,
    read_gpus: ReadGpus = not_read,
) -> int:
    """Score this worker's windows until the stage has no more; returns how many were scored.

    The teacher's files are downloaded below `scratch`. Raises Permanent if the stage may not begin, or if the
    teacher or a window is invalid, StorageError, Terminated if it was asked to stop.
    """
    require_validity(run, stage, bucket)
    found = model.resolve_teacher(run, bucket)
    job = ScoringWorker(run, bucket, provenance, stopping, board, worker, stage, found.sha256, read_gpus)
    job.refresh()
    missing = (window for window in count(worker or 0, job.workers) if window not in job.scored)
    window, done = next(missing), 0
    if not (job.stage_finished() or job.after_last_window(window)):
        job.report_windows("Loading the teacher")
        teacher = load_teacher(
            model.fetch_teacher(found, bucket, scratch, job.check_stop), run.spec.training.sequence_length
        )
        while score_window(job, teacher, window):
            window, done = next(missing), done + 1
    report_end(job)
    return done


def score_window(job: ScoringWorker, teacher: Teacher, window: int) -> bool:
    """Wait for a window and score it.

    Returns False if the stage has no such window or needs no more scores.
    """
    started = time.monotonic()
    if not wait_for_rollouts(job, window):
        return False
    available = time.monotonic()
    sampled = read_window(job, window)
    job.read_gpus()  # what it did before is not the window's
    logp = score_rollouts(job, teacher, sampled)
    seconds, tokens = time.monotonic() - available, sum(len(one.ids_T) for one in sampled.rollouts)
    line = ScoringLine(
        attempt=job.provenance.attempt,
        worker=job.worker or 0,
        window=window,
        seconds=seconds,
        wait_rollouts=available - started,
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        gpu=job.read_gpus(),
    )
    write_window_metrics(job, line)  # before the scores, after which no attempt comes back to this window
    write_scores(job, sampled, logp)
    log.info(
        f"Scored window {window}: {len(sampled.rollouts):,} rollouts, {tokens:,} tokens in {seconds:,.1f} s, "
        f"waited {available - started:,.1f} s"
    )
    job.report_windows(f"Scored window {window}", tokens / seconds)
    return True


def wait_for_rollouts(job: ScoringWorker, window: int) -> bool:
    """Wait until a window has rollouts.

    Returns False once it is certain that it will not be sampled or trained.
    """
    reported = time.monotonic()
    while True:
        job.check_stop()
        if job.stage_finished():
            return False
        if job.bucket.exists(job.key(window, "rollouts")):
            return True
        if job.after_last_window(window):
            return False
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            job.report_windows(f"Waiting for window {window}")
        job.pause(POLL_SECONDS)


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
            raise _foreign_window(
                job, key, f"{name} is {getattr(sampled.header, name)} there and {value} here"
            )
    longest = job.run.spec.training.sequence_length
    for one in sampled.rollouts:
        which = f"rollout {one.rollout} of prompt {one.prompt}"
        if not 0 < len(one.logp_C) < len(one.ids_T) <= longest:
            tokens = f"{len(one.ids_T)} tokens, {len(one.logp_C)} of them sampled"
            raise _foreign_window(job, key, f"{which} has {tokens}; sequenceLength is {longest}")
        if not 0 <= one.ids_T.min() <= one.ids_T.max() < VOCABULARY_SIZE:
            raise _foreign_window(job, key, f"{which} has ids from {one.ids_T.min()} to {one.ids_T.max()}")
    job.last[window] = sampled.header.last
    return sampled


def score_rollouts(
    job: ScoringWorker, teacher: Teacher, sampled: WindowRollouts
) -> list[NDArray[np.float32]]:
    """For each rollout the teacher's log-probabilities of its completion, [C], given the same prompt as the
    student's.

    The prompt keeps its effort. Raises Permanent if a token has no log-probability, or if all of the window
    so far are uniform.
    """
    logp = []
    uniform = UniformCheck(f"window {sampled.header.window}")
    for one, logp_T in zip(
        sampled.rollouts, teacher.score((one.ids_T for one in sampled.rollouts), job.check_stop), strict=True
    ):
        logp_C = logp_T[one.prompt_length :]
        missing = np.flatnonzero(np.isnan(logp_C))
        if len(missing):
            raise Permanent(
                f"teacher.model: rollout {one.rollout} of prompt {one.prompt} of window "
                f"{sampled.header.window}: the teacher gave {len(missing)} of its tokens no probability, the "
                f"first at {missing[0]} of {len(logp_C)}. Its weights may hold numbers that are not finite, "
                "or overflow in their dtype; try another checkpoint."
            )
        uniform.add(logp_C)
        logp.append(logp_C)
    return logp


def write_scores(job: ScoringWorker, sampled: WindowRollouts, logp: list[NDArray[np.float32]]) -> None:
    """Write a window's scores unless there are some.

    Raises Permanent if existing scores are of other rollouts.
    """
    header = sampled.header
    data = scores_bytes(
        ScoresHeader(
            run=header.run,
            stage=header.stage,
            window=header.window,
            rollouts=sampled.sha256,
            teacher=job.teacher,
        ),
        logp,
    )
    key = job.key(header.window, "scores")
    if not job.bucket.create(key, data, job.provenance.metadata()):
        read_scores(job.bucket.get(key), job.bucket.url(key), sampled)
        log.info("Window %d: another attempt has written scores with other bits; keeping them", header.window)


def write_window_metrics(job: ScoringWorker, line: ScoringLine) -> None:
    """Write a window's line of metrics: one object per window, so scoring it again leaves no second line."""
    key = paths.metrics(job.run, job.provenance.step, f"window-{line.window:06d}")
    job.bucket.put_bytes(key, json.dumps(line.dump()).encode() + b"\n", job.provenance.metadata())


def report_end(job: ScoringWorker) -> None:
    """Report how the step ended. The worker that finds all windows scored reports success."""
    job.report_windows("Scored this worker's windows")
    job.refresh()
    if job.stage_finished() or job.scored >= job.sampled:
        job.report_success("Complete", len(job.scored))


def _foreign_window(job: ScoringWorker, key: str, why: str) -> Permanent:
    return Permanent(
        f"{job.bucket.url(key)}: {why}. The run's sampler did not write it; delete it to have the window "
        "sampled again."
    )
