"""The teacher of an OnPolicy stage: rollouts in, the teacher's log-probability of every sampled token out, window by window as they appear.

Worker w of W scores the windows k ≡ w (mod W), in order, each into one object that is written once: a killed worker goes on at its first
window without scores. The teacher is loaded at once and not when the first window is there, since the sampler loads the student and samples
that window meanwhile. What is in the files is vpmoe.rollout.window_files's business, what follows from the numbers the trainer's.
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
from vpmoe.api.stages import OnPolicy
from vpmoe.clock import now
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.failure import Permanent
from vpmoe.process.step_worker import StepWorker, step_succeeded
from vpmoe.provenance import Provenance
from vpmoe.rollout.gate import require_validity
from vpmoe.rollout.window_files import ScoresHeader, WindowRollouts, read_rollouts, read_scores, scores_bytes
from vpmoe.storage import Bucket, paths
from vpmoe.teacher import model
from vpmoe.teacher.rescore import LoadTeacher, Teacher

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Seconds between two looks for the next window."""

REPORT_SECONDS = 10.0
"""Seconds between reports while there is nothing to score."""

NAME = re.compile(r"window-(\d+)\.(rollouts|scores)\.arrow")


@dataclass(frozen=True)
class ScoringWorker(StepWorker):
    """One worker's view of the stage."""

    stage: OnPolicy
    teacher: str
    """sha256 of what the run's teacher was resolved to."""
    sampled: set[int] = field(default_factory=set)
    """Windows that have rollouts, as far as they were looked for."""
    scored: set[int] = field(default_factory=set)
    """Windows that have scores, of all workers."""
    last: dict[int, bool] = field(default_factory=dict)
    """Of the windows that were read, whether the stage has none after it."""

    @property
    def workers(self) -> int:
        """How many share the windows; by hand one process scores all."""
        return 1 if self.worker is None else self.run.spec.teacher.gpus

    def key(self, window: int, kind: Literal["rollouts", "scores"]) -> str:
        return paths.window(self.run, self.stage.name, window, kind)

    def look(self) -> None:
        """Find what is sampled and scored. Asks for nothing before the first window that had no scores at the last look."""
        whole = next(window for window in count() if window not in self.scored)
        folder = self.key(0, "scores").rpartition("/")[0]
        for found in self.bucket.list(f"{folder}/window-", self.key(whole - 1, "scores") if whole else ""):
            if named := NAME.search(found.key):
                (self.scored if named[2] == "scores" else self.sampled).add(int(named[1]))

    def ended(self) -> bool:
        """Whether the stage is trained to its end, so that nobody waits for scores."""
        return step_succeeded(self.run, self.bucket, self.stage.name)

    def beyond(self, window: int) -> bool:
        """Whether the stage ends before this window. The last one is among those since this worker's own one before."""
        return any(self._last(before) for before in range(max(0, window - self.workers), window))

    def _last(self, window: int) -> bool:
        if window not in self.last and self.bucket.exists(self.key(window, "rollouts")):
            read_window(self, window)
        return self.last.get(window, False)

    def say(self, message: str, speed: float | None = None) -> None:
        """Report for all workers, which the first does."""
        if not self.worker:
            self.look()
            self.report(message, len(self.scored), len(self.sampled), speed)


def score_windows(
    run: DistillRun,
    stage: OnPolicy,
    bucket: Bucket,
    provenance: Provenance,
    stopping: threading.Event,
    worker: int | None,
    load_teacher: LoadTeacher,
    scratch: Path,
) -> int:
    """Score this worker's windows of a stage until no more will come; returns how many these were.

    The teacher's files are brought below `scratch`. Raises Permanent where the teacher or a window is at fault, or the stage may not begin,
    StorageError, Terminated where it was asked to stop.
    """
    require_validity(run, stage, bucket)
    found = model.resolve_teacher(run, bucket)
    job = ScoringWorker(run, bucket, provenance, stopping, worker, stage, found.sha256)
    job.look()
    missing = (window for window in count(worker or 0, job.workers) if window not in job.scored)
    window, done = next(missing), 0
    if not (job.ended() or job.beyond(window)):
        job.say("Loading the teacher")
        teacher = load_teacher(
            model.fetch_teacher(found, bucket, scratch, job.check_stop), run.spec.training.sequence_length
        )
        while score_window(job, teacher, window):
            window, done = next(missing), done + 1
    report_end(job)
    return done


def score_window(job: ScoringWorker, teacher: Teacher, window: int) -> bool:
    """Wait for a window and score it; False where it will not come."""
    started = time.monotonic()
    if not wait_for_rollouts(job, window):
        return False
    begun = time.monotonic()
    held = read_window(job, window)
    logp = score_rollouts(job, teacher, held)
    seconds, tokens = time.monotonic() - begun, sum(len(one.ids_T) for one in held.rollouts)
    measured = {
        "seconds": seconds,
        "waitRollouts": begun - started,
        "tokens": tokens,
        "tokensPerSecond": tokens / seconds,
    }
    write_window_metrics(job, window, measured)  # before the scores, after which the window is not met again
    write_scores(job, held, logp)
    log.info(
        f"Window {window}: {len(held.rollouts):,} rollouts, {tokens:,} tokens in {seconds:,.1f} s, waited {begun - started:,.1f} s"
    )
    job.say(f"Window {window} scored", tokens / seconds)
    return True


def wait_for_rollouts(job: ScoringWorker, window: int) -> bool:
    """Wait until a window has rollouts: True; or until it is certain that nobody will sample or train it: False."""
    said = time.monotonic()
    while True:
        job.check_stop()
        if job.ended():
            return False
        if job.bucket.exists(job.key(window, "rollouts")):
            return True
        if job.beyond(window):
            return False
        if time.monotonic() - said > REPORT_SECONDS:
            said = time.monotonic()
            job.say(f"Waiting for window {window}")
        job.pause(POLL_SECONDS)


def read_window(job: ScoringWorker, window: int) -> WindowRollouts:
    """A window's rollouts. Raises Permanent where they are damaged, another's, or cannot be scored."""
    key = job.key(window, "rollouts")
    held = read_rollouts(job.bucket.get(key), job.bucket.url(key))
    ours = {
        "run": job.provenance.run,
        "config": job.run.config_hash,
        "stage": job.stage.name,
        "window": window,
    }
    for name, value in ours.items():
        if getattr(held.header, name) != value:
            raise _foreign_window(job, key, f"{name} is {getattr(held.header, name)} there and {value} here")
    longest = job.run.spec.training.sequence_length
    for one in held.rollouts:
        which = f"rollout {one.rollout} of prompt {one.prompt}"
        if not 0 < len(one.logp_C) < len(one.ids_T) <= longest:
            tokens = f"{len(one.ids_T)} tokens, {len(one.logp_C)} of them sampled"
            raise _foreign_window(job, key, f"{which} has {tokens}; sequenceLength is {longest}")
        if not 0 <= one.ids_T.min() <= one.ids_T.max() < VOCABULARY_SIZE:
            raise _foreign_window(job, key, f"{which} has ids from {one.ids_T.min()} to {one.ids_T.max()}")
    job.last[window] = held.header.last
    return held


def score_rollouts(job: ScoringWorker, teacher: Teacher, held: WindowRollouts) -> list[NDArray[np.float32]]:
    """For each rollout the log-probabilities of its completion, [C], given the very prompt that the student saw, its effort included.

    Raises Permanent where a token has none.
    """
    logp = []
    for one, logp_T in zip(
        held.rollouts, teacher.score((one.ids_T for one in held.rollouts), job.check_stop), strict=True
    ):
        logp_C = logp_T[one.prompt_length :]
        missing = np.flatnonzero(np.isnan(logp_C))
        if len(missing):
            raise Permanent(
                f"teacher.model: rollout {one.rollout} of prompt {one.prompt} of window {held.header.window}: the teacher gave "
                f"{len(missing)} of its tokens no probability, the first at {missing[0]} of {len(logp_C)}. Its weights may hold numbers "
                "that are not finite, or overflow in their dtype; try another checkpoint."
            )
        logp.append(logp_C)
    return logp


def write_scores(job: ScoringWorker, held: WindowRollouts, logp: list[NDArray[np.float32]]) -> None:
    """Write a window's scores, unless there are some: then those hold. Raises Permanent where they are of other rollouts."""
    about = held.header
    data = scores_bytes(
        ScoresHeader(
            run=about.run, stage=about.stage, window=about.window, rollouts=held.sha256, teacher=job.teacher
        ),
        logp,
    )
    key = job.key(about.window, "scores")
    if not job.bucket.create(key, data, job.provenance.metadata()):
        read_scores(job.bucket.get(key), job.bucket.url(key), held)
        log.info("Window %d: another attempt's scores are there, with other bits; they hold", about.window)


def write_window_metrics(job: ScoringWorker, window: int, measured: dict[str, float]) -> None:
    """Write a window's line of metrics: an object a window, so whoever scores it again leaves no second line."""
    line = {
        "event": "window",
        "time": now().isoformat(timespec="milliseconds"),
        "attempt": job.provenance.attempt,
        "worker": job.worker or 0,
        "window": window,
        **measured,
    }
    key = paths.metrics(job.run, job.provenance.step, f"window-{window:06d}")
    job.bucket.put_bytes(key, json.dumps(line).encode() + b"\n", job.provenance.metadata())


def report_end(job: ScoringWorker) -> None:
    """Say how the stage ended; whoever scores the last of the windows says that all are."""
    job.say("This worker's windows are scored")
    job.look()
    if job.ended() or job.scored >= job.sampled:
        job.report_success("Complete", len(job.scored))


def _foreign_window(job: ScoringWorker, key: str, why: str) -> Permanent:
    return Permanent(
        f"{job.bucket.url(key)}: {why}. The run's sampler did not write it; delete it, and the window is sampled again."
    )
