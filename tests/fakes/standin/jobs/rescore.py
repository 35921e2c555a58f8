"""Stand-in rescoring: writes a record a part, shared by all runs with the same dataset and teacher.

It reports progress, obeys SIGTERM and its script. Each pod writes the number of parts that it found to
`standin/rescore/<pod>.json`.
"""

import hashlib
import socket
import time

from jobs.entrypoint import JobContext, entrypoint, record_success
from jobs.script import Script, report_progress
from vpmoe.api import DistillRun
from vpmoe.api.progress import Amount, Progress
from vpmoe.clock import now
from vpmoe.failure import Terminated
from vpmoe.storage import paths


def main() -> None:
    run, context = entrypoint("rescore")
    script, workers = Script.from_run(run, context), run.spec.teacher.gpus
    total, worker = int(script.number("parts", workers)), context.worker or 0
    found = done(run, context)
    pod = f"{paths.run(run)}/standin/rescore/{socket.gethostname()}.json"
    context.bucket.write_json(pod, {"attempt": context.attempt, "from": found})
    if found == total:
        report(run, context, total, total, reused=context.attempt == 1)  # else its own
    else:
        score(run, context, script, total, worker, workers)
    record_success(context.board)


def score(
    run: DistillRun, context: JobContext, script: Script, total: int, worker: int, workers: int
) -> None:
    """Write this worker's parts that are missing."""
    report(run, context, done(run, context), total)
    wait_for(script.settings.get("beside", ""), run, context)
    for part in range(worker, total, workers):
        key = f"{scores(run)}/{part}.json"
        if not context.bucket.exists(key):
            script.reach(-101 - part)
            context.bucket.write_json(key, {"part": part})
            report(run, context, done(run, context), total)
        if context.stopping.is_set():
            raise Terminated(f"part {part} is written")
    report(run, context, done(run, context), total)  # the last worker to finish counts all of them


def scores(run: DistillRun) -> str:
    """Folder of the records, named by the hash of what they depend on."""
    text = run.spec.dataset.model_dump_json() + run.spec.teacher.model_dump_json()
    return f"scores/{hashlib.sha256(text.encode()).hexdigest()}"


def done(run: DistillRun, context: JobContext) -> int:
    return len(list(context.bucket.list(scores(run) + "/")))


def report(run: DistillRun, context: JobContext, count: int, total: int, reused: bool = False) -> None:
    """Report the progress of all workers."""
    progress = Progress(
        run=run.identity,
        step=context.step,
        attempt=context.attempt,
        state="Succeeded" if count == total else "Running",
        message="Reused" if reused else f"{count} of {total} parts",
        reused=reused or None,
        updated=now(),
        parts=Amount(done=count, total=total),
    )
    report_progress(run, context, progress)


def wait_for(step: str, run: DistillRun, context: JobContext) -> None:
    """Wait until that step has reported progress, so that the scoring runs beside it."""
    while step and not context.stopping.is_set() and not context.bucket.exists(paths.progress(run, step)):
        time.sleep(0.2)


if __name__ == "__main__":
    main()
