"""Stand-in training: writes checkpoints that hold a number. It reports progress, obeys SIGTERM and its
script.

Each pod writes the step that it started from to `standin/<step>/<pod>.json`.
"""

import os
import socket
import time

from jobs import pod_server
from jobs.entrypoint import JobContext, entrypoint, record_success
from jobs.script import Script, report_progress
from jobs.windows import wait_for
from vpmoe.api import DistillRun
from vpmoe.api.progress import Amount, CheckpointStatus, HeldOut, Progress, SpanLoss
from vpmoe.clock import now
from vpmoe.failure import Terminated
from vpmoe.storage import paths


def main() -> None:
    run, context = entrypoint("train")
    script = Script.from_run(run, context)
    steps, every = int(script.number("steps", 6)), int(script.number("every", 2))
    first = last_checkpoint(run, context)
    pod = f"{paths.run(run)}/standin/{context.step}/{socket.gethostname()}.json"
    context.bucket.write_json(
        pod, {"attempt": context.attempt, "from": first, "rank": os.environ.get("RANK", "0")}
    )
    if os.environ.get("RANK", "0") != "0":  # a Worker of a PyTorchJob
        wait_for_master(run, context)
        record_success(context.board)
        return
    if port := os.environ.get(pod_server.PORT_VARIABLE):  # the entrypoint takes it for the ranks' launcher
        pod_server.serve(context.board, port)
    report(run, context, first, steps, first)
    saved = first
    for step in range(steps - 1 if script.hurries else first, steps):
        if run.stage(context.step).sampler_gpus:  # OnPolicy: each step trains a window
            wait_for(run, context, step, "scores")
        script.reach(step)
        stopping = context.stopping.is_set()  # read once: a SIGTERM during the save counts for the next step
        if (step + 1) % every == 0 or step + 1 == steps or stopping:
            saved = step + 1
            key = paths.manifest(paths.checkpoint(run, context.step, saved))
            context.bucket.write_json(key, {"iteration": saved}, context.provenance.metadata())
        report(run, context, step + 1, steps, saved)
        if stopping and step + 1 < steps:
            raise Terminated(f"checkpoint {saved} is saved")
    record_success(context.board)


def last_checkpoint(run: DistillRun, context: JobContext) -> int:
    """The step of the last checkpoint; 0 if there is none."""
    folder = paths.checkpoints(run, context.step) + "/"
    return max(
        (int(found.key.removeprefix(folder).split("/")[0]) for found in context.bucket.list(folder)),
        default=0,
    )


def report(run: DistillRun, context: JobContext, done: int, steps: int, saved: int) -> None:
    """Report the progress."""
    tokens = run.stage(context.step).tokens
    folder = paths.checkpoint(run, context.step, saved)
    facts = CheckpointStatus(
        iteration=saved,
        tokens=tokens * saved // steps,
        manifest=context.bucket.url(paths.manifest(folder)),
        sha256="0" * 64,
    )
    progress = Progress(
        run=run.identity,
        step=context.step,
        attempt=context.attempt,
        state="Succeeded" if done == steps else "Running",
        message=f"step {done} of {steps}",
        updated=now(),
        tokens=Amount(done=tokens * done // steps, total=tokens),
        tokens_per_second=1000.0,
        loss=9.0 - done / 10,
        checkpoint=facts if saved else None,
        held_out=HeldOut(
            before=SpanLoss(reasoning=9.0, final=8.0), latest=SpanLoss(reasoning=8.0, final=7.0)
        ),
    )
    report_progress(run, context, progress)


def wait_for_master(run: DistillRun, context: JobContext) -> None:
    """Wait until the Master has succeeded."""
    while not context.stopping.is_set():
        key = paths.progress(run, context.step)
        if context.bucket.exists(key) and context.bucket.get_json(key)["state"] == "Succeeded":
            return
        time.sleep(0.3)


if __name__ == "__main__":
    main()
