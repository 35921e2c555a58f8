"""Train one stage of a run. All the work is in vpmoe.trainer; this file binds it to a pod, or to a shell.

Without LOCAL_RANK in the environment this is the launcher: it starts the same file once a rank, and
jobs.forced_teacher once for each teacher of a TeacherForced stage.
"""

import logging
import os
import sys
from pathlib import Path

from jobs.entrypoint import JobContext, entrypoint, record_success
from vpmoe.api import DistillRun
from vpmoe.api.layout import layout, teacher_processes
from vpmoe.data.dataset import load_training_dataset
from vpmoe.process import launcher
from vpmoe.process.memory import keep_freed_memory, no_collection
from vpmoe.rollout import gate
from vpmoe.rollout.version_volume import mounted_volume
from vpmoe.trainer import stage_inputs

log = logging.getLogger(__name__)


def main() -> None:
    if "LOCAL_RANK" in os.environ:
        launcher.set_parent_death_signal()
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            keep_freed_memory()
        work(*entrypoint("train"))
    else:
        run, context = entrypoint("train")
        code = start(run, context)
        if code == 0:  # rank 0 has recorded it with the progress, but it may be in another pod
            record_success(context.board)
        raise SystemExit(code)


def start(run: DistillRun, context: JobContext) -> int:
    """Launch the stage's processes, wait for them and return the exit code. Launches none for a finished
    stage."""
    stage = stage_inputs.training_stage(run, context.step)
    if end := stage_inputs.report_if_finished(run, stage, context.bucket, context.provenance, context.board):
        log.info("Stage %s has already finished: %d steps, %d tokens", stage.name, end.steps, end.tokens)
        return 0
    if stage.min_validity > 0 and not stage.samples and not run.measures_validity(stage):
        # A run of an earlier version: such a stop is rejected today.
        log.warning(
            "Stage %s: validity is not measured while a TeacherForced stage trains, or if "
            "evaluation.completions is 0, so stop.minValidity %g keeps it from ending early. Set it to 0 to "
            "end by the held-out loss alone",
            stage.name,
            stage.min_validity,
        )
    gate.require_validity(run, stage, context.bucket)
    stage_inputs.load_scores(run, stage, context.bucket, load_training_dataset(run, context.bucket))
    spec = run.spec
    placement = launcher.place_ranks(
        layout(spec.student, spec.training, stage),
        os.environ,
        teacher_processes(spec.teacher, spec.student, stage),
    )
    rank, teacher = (
        [sys.executable, "-m", module, *sys.argv[1:], "--step", stage.name]
        for module in ("jobs.train", "jobs.forced_teacher")
    )
    return launcher.launch_workers(placement, rank, teacher, context.stopping)


def work(run: DistillRun, context: JobContext) -> None:
    """Train, as one rank."""
    with no_collection():
        import torch  # takes some seconds with megatron-core, which the launcher does not need

        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            # megatron-core, when imported, would load a compiler for functions that nothing calls
            torch.compiler.set_default_backend("eager")

        from vpmoe.trainer.context import StageContext
        from vpmoe.trainer.trainer import train

    logging.getLogger().setLevel(logging.INFO if os.environ["RANK"] == "0" else logging.WARNING)
    stage = stage_inputs.training_stage(run, context.step)
    dataset = load_training_dataset(run, context.bucket)
    train(
        StageContext(
            run=run,
            stage=stage,
            bucket=context.bucket,
            dataset=dataset,
            provenance=context.provenance,
            stopping=context.stopping,
            scratch=Path(os.environ["VPMOE_SCRATCH"]),
            weights_volume=mounted_volume(),
            scores=stage_inputs.load_scores(run, stage, context.bucket, dataset),
            board=context.board,
        )
    )
    if os.environ["RANK"] == "0":
        record_success(context.board)


if __name__ == "__main__":
    main()
