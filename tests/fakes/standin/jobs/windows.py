"""Shared by the stand-in sampler and teacher: writes windows in order, each once, as objects that hold their
number."""

import time
from typing import Literal

from jobs.entrypoint import JobContext
from jobs.script import Script, report_progress
from vpmoe.api import DistillRun
from vpmoe.api.progress import Amount, Progress
from vpmoe.clock import now
from vpmoe.failure import Terminated
from vpmoe.storage import paths

Kind = Literal["rollouts", "scores"]


def write_windows(run: DistillRun, context: JobContext, kind: Kind, worker: int, workers: int) -> None:
    """Write this worker's windows that do not exist yet, scores after rollouts. The first worker reports for
    all."""
    script, stage = Script.from_run(run, context), stage_of(run, context)
    total = int(script.number("windows", script.number("steps", 6)))
    for window in range(worker, total, workers):
        key = paths.window(run, stage, window, kind)
        if context.bucket.exists(key):
            continue
        if kind == "scores":
            wait_for(run, context, window, "rollouts")
        script.reach(-(201 if kind == "rollouts" else 301) - window)
        context.bucket.create(key, b"%d" % window, {})
        if worker == 0:
            report(run, context, kind, total)
        if context.stopping.is_set():
            raise Terminated(f"window {window} is written")
    report(run, context, kind, total)  # the last worker to finish counts all of them


def wait_for(run: DistillRun, context: JobContext, window: int, kind: Kind) -> None:
    """Wait until that window exists."""
    while not context.bucket.exists(paths.window(run, stage_of(run, context), window, kind)):
        if context.stopping.is_set():
            raise Terminated(f"waited for {kind} of window {window}")
        time.sleep(0.2)


def stage_of(run: DistillRun, context: JobContext) -> str:
    """Name of the stage that the step belongs to."""
    stage = run.stage_of(context.step)
    assert stage is not None
    return stage.name


def report(run: DistillRun, context: JobContext, kind: Kind, total: int) -> None:
    """Report the progress of all workers."""
    folder = paths.window(run, stage_of(run, context), 0, kind).rpartition("/")[0]
    count = sum(found.key.endswith(f".{kind}.arrow") for found in context.bucket.list(folder + "/"))
    progress = Progress(
        run=run.identity,
        step=context.step,
        attempt=context.attempt,
        state="Succeeded" if count == total else "Running",
        message=f"{kind} of {count} windows",
        updated=now(),
        parts=Amount(done=count, total=total),
    )
    report_progress(run, context, progress)
