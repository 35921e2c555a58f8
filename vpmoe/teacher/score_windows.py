"""The teacher of an OnPolicy stage: scores the sampled tokens of every window, as windows appear.

Worker w of W scores the windows k ≡ w (mod W), in order, each into one object that is written once. A
restarted worker continues with its first window without scores. While it waits for a window, it scores the
finished rollouts of the window's version (score_parts.py). The teacher is loaded at the start and not when
the first window appears, because meanwhile the sampler loads the student and samples that window. The files
are described in vpmoe.rollout.window_files.
"""

import json
import logging
import threading
import time
from collections.abc import Iterable
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vpmoe.api import DistillRun, pod_metrics
from vpmoe.api.metrics import MetricsLine, Sample
from vpmoe.api.stages import OnPolicy
from vpmoe.process.board import ProgressBoard
from vpmoe.process.gpu import GpuUse, ReadGpus, not_read
from vpmoe.provenance import Provenance
from vpmoe.rollout.gate import require_validity
from vpmoe.rollout.part_files import RolloutKey
from vpmoe.rollout.window_files import ScoresHeader, WindowRollouts, read_scores, scores_bytes
from vpmoe.storage import Bucket, paths
from vpmoe.teacher import model
from vpmoe.teacher.rescore import LoadTeacher, Teacher
from vpmoe.teacher.score_parts import PartScorer
from vpmoe.teacher.scoring_worker import ScoringWorker, read_window, score_rollouts

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Seconds between two checks for the next window."""

REPORT_SECONDS = 10.0
"""Seconds between reports while waiting for a window."""


class ScoringLine(MetricsLine):
    """The teacher's line of metrics for a window."""

    event: str = "window"
    worker: int
    window: int
    seconds: float
    """Time to read and score the window, and of scoring parts the share of its rollouts."""
    wait_rollouts: float
    """Seconds that the worker waited for the window or a part."""
    tokens: int
    """Tokens of the window: prompts and completions."""
    tokens_per_second: float
    """Without tokens that an earlier attempt scored."""
    early: int
    """Rollouts that were scored before the window was there, from parts."""
    gpu: GpuUse
    """While the window was scored; if some of it was in parts, since the window before."""

    def samples(self) -> Iterable[Sample]:
        yield Sample(pod_metrics.TEACHER_WINDOW, self.window)
        yield Sample(pod_metrics.TEACHER_WINDOW_SECONDS, self.seconds)
        yield Sample(pod_metrics.TOKENS, self.tokens_per_second * self.seconds)
        yield from self.gpu.samples()


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
        parts = PartScorer(job, teacher)
        while score_window(job, teacher, parts, window):
            window, done = next(missing), done + 1
    report_end(job)
    return done


def score_window(job: ScoringWorker, teacher: Teacher, parts: PartScorer, window: int) -> bool:
    """Wait for a window, scoring what is finished of it, and score the rest.

    Returns False if the stage has no such window or needs no more scores.
    """
    started, before = time.monotonic(), parts.seconds
    job.read_gpus()  # what they did before is not the window's
    if not wait_for_rollouts(job, parts, window):
        return False
    available = time.monotonic()
    waited = available - started - (parts.seconds - before)
    sampled = read_window(job, window)
    early = parts.scores_of(sampled)
    rollouts = {RolloutKey(window, one.prompt, one.rollout): one for one in sampled.rollouts}
    rest = {key: one for key, one in rollouts.items() if key not in early}
    if not early:
        job.read_gpus()  # nor is what they did while it was waited for
    found = score_rollouts(job, teacher, rest, f"window {window}")
    logp = [early[key].logp_C if key in early else found[key] for key in rollouts]
    seconds = time.monotonic() - available + sum(one.seconds for one in early.values())
    tokens = sum(len(one.ids_T) for one in sampled.rollouts)
    adopted = sum(len(one.rollout.ids_T) for one in early.values() if not one.seconds)
    line = ScoringLine(
        attempt=job.provenance.attempt,
        worker=job.worker or 0,
        window=window,
        seconds=seconds,
        wait_rollouts=waited,
        tokens=tokens,
        tokens_per_second=(tokens - adopted) / seconds,
        early=len(early),
        gpu=job.read_gpus(),
    )
    write_window_metrics(job, line)  # before the scores, after which no attempt comes back to this window
    write_scores(job, sampled, logp)
    log.info(
        f"Scored window {window}: {len(rollouts):,} rollouts, {len(early):,} of them before it was there, "
        f"{tokens:,} tokens in {seconds:,.1f} s, waited {waited:,.1f} s"
    )
    job.report_windows(f"Scored window {window}", line.tokens_per_second)
    return True


def wait_for_rollouts(job: ScoringWorker, parts: PartScorer, window: int) -> bool:
    """Wait until a window has rollouts, and score the parts of its version meanwhile.

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
        if parts.score_next(window):
            continue
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            job.report_windows(f"Waiting for window {window}")
        with job.board.metrics.waiting("rollouts"):
            job.pause(POLL_SECONDS)


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
    job.board.metrics.record(line.samples())


def report_end(job: ScoringWorker) -> None:
    """Report how the step ended. The worker that finds all windows scored reports success."""
    job.report_windows("Scored this worker's windows")
    job.refresh()
    if job.stage_finished() or job.scored >= job.sampled:
        job.report_success("Complete", len(job.scored))
