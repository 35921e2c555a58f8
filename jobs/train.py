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
from vpmoe.evaluation import require
from vpmoe.training import launch, stage

log = logging.getLogger(__name__)


def main() -> None:
    if "LOCAL_RANK" in os.environ:
        launch.die_with_launcher()
        (teach if os.environ.get("VPMOE_PART") == "teacher" else work)(*entrypoint("train"))
    else:
        raise SystemExit(start(*entrypoint("train")))


def start(run: DistillRun, context: Context) -> int:
    """Launch the stage's processes and wait for them; returns the exit code. Nothing is launched for a stage that is finished."""
    chosen = stage.trainable(run, context.step)
    if done := stage.finished(run, chosen, context.bucket, context.provenance):
        log.info("Stage %s is finished already: %d steps, %d tokens", chosen.name, done.steps, done.tokens)
        return 0
    require.check(run, chosen, context.bucket)
    stage.scores(run, chosen, context.bucket, stage.dataset(run, context.bucket))
    placement = launch.place(layout(run.spec, chosen), os.environ, isinstance(chosen, TeacherForced))
    command = [sys.executable, "-m", "jobs.train", *sys.argv[1:], "--step", chosen.name]
    return launch.launch(placement, command, context.stopping)


def work(run: DistillRun, context: Context) -> None:
    """What each process does."""
    import torch  # some seconds with megatron-core, which the launcher does without

    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        torch.compiler.set_default_backend("eager")  # megatron-core, when imported, would load a compiler for functions that nobody calls

    from vpmoe.training.loop import train
    from vpmoe.training.task import Task

    logging.getLogger().setLevel(logging.INFO if os.environ["RANK"] == "0" else logging.WARNING)
    chosen = stage.trainable(run, context.step)
    made = stage.dataset(run, context.bucket)
    scratch = Path(os.environ["VPMOE_SCRATCH"])
    scores = stage.scores(run, chosen, context.bucket, made)
    train(Task(run, chosen, context.bucket, made, context.provenance, context.stopping, scratch, scores))


def teach(run: DistillRun, context: Context) -> None:
    """What the teacher's process does."""
    from vpmoe.training.forced.serve import teach as serve

    students, address, port = int(os.environ["WORLD_SIZE"]), os.environ["MASTER_ADDR"], int(os.environ["VPMOE_TEACHER_PORT"])
    serve(run, context.bucket, students, address, port, Path(tempfile.gettempdir()) / "vpmoe-teacher", context.stopping)


if __name__ == "__main__":
    main()
