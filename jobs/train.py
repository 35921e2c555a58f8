"""Train one stage of a run. All the work is vpmoe.training's; this file binds it to a pod, or to a shell.

Without LOCAL_RANK in the environment it is the launcher, which starts this same file once a rank, and once as the teacher of a
TeacherForced stage.
"""

import logging
import os
import sys
import tempfile
from pathlib import Path

from jobs.entrypoint import Context, entrypoint
from vpmoe.api import DistillRun
from vpmoe.api.layout import layout
from vpmoe.api.stages import TeacherForced
from vpmoe.process import launcher
from vpmoe.rollout import gate
from vpmoe.trainer import stage_inputs

log = logging.getLogger(__name__)


def main() -> None:
    if "LOCAL_RANK" in os.environ:
        launcher.die_with_launcher()
        (teach if os.environ.get("VPMOE_PART") == "teacher" else work)(*entrypoint("train"))
    else:
        raise SystemExit(start(*entrypoint("train")))


def start(run: DistillRun, context: Context) -> int:
    """Launch the stage's processes and wait for them; returns the exit code. Nothing is launched for a stage that is finished."""
    chosen = stage_inputs.trainable(run, context.step)
    if done := stage_inputs.finished(run, chosen, context.bucket, context.provenance):
        log.info("Stage %s is finished already: %d steps, %d tokens", chosen.name, done.steps, done.tokens)
        return 0
    gate.check(run, chosen, context.bucket)
    stage_inputs.scores(run, chosen, context.bucket, stage_inputs.dataset(run, context.bucket))
    placement = launcher.place(
        layout(run.spec.student, run.spec.training, chosen), os.environ, isinstance(chosen, TeacherForced)
    )
    command = [sys.executable, "-m", "jobs.train", *sys.argv[1:], "--step", chosen.name]
    return launcher.launch(placement, command, context.stopping)


def work(run: DistillRun, context: Context) -> None:
    """What each process does."""
    import torch  # some seconds with megatron-core, which the launcher does without

    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        torch.compiler.set_default_backend(
            "eager"
        )  # megatron-core, when imported, would load a compiler for functions that nobody calls

    from vpmoe.trainer.context import StageContext
    from vpmoe.trainer.trainer import train

    logging.getLogger().setLevel(logging.INFO if os.environ["RANK"] == "0" else logging.WARNING)
    chosen = stage_inputs.trainable(run, context.step)
    made = stage_inputs.dataset(run, context.bucket)
    scratch = Path(os.environ["VPMOE_SCRATCH"])
    scores = stage_inputs.scores(run, chosen, context.bucket, made)
    train(
        StageContext(run, chosen, context.bucket, made, context.provenance, context.stopping, scratch, scores)
    )


def teach(run: DistillRun, context: Context) -> None:
    """What the teacher's process does."""
    from vpmoe.trainer.teacher_forced.server import teach as serve

    students, address, port = (
        int(os.environ["WORLD_SIZE"]),
        os.environ["MASTER_ADDR"],
        int(os.environ["VPMOE_TEACHER_PORT"]),
    )
    serve(
        run,
        context.bucket,
        students,
        address,
        port,
        Path(tempfile.gettempdir()) / "vpmoe-teacher",
        context.stopping,
    )


if __name__ == "__main__":
    main()
