"""Score the windows of an OnPolicy stage with the teacher.

All the work is in vpmoe.teacher; this file binds it to a pod, or to a shell.
"""

from jobs.entrypoint import entrypoint, record_success
from vpmoe.api.stages import OnPolicy
from vpmoe.inference.teacher_engine import TeacherEngine
from vpmoe.process.gpu import job_meter
from vpmoe.teacher.folder import teacher_folder
from vpmoe.teacher.score_windows import score_windows


def main() -> None:
    """Score this pod's windows."""
    run, context = entrypoint("teacher")
    stage = run.stage_of(context.step)
    assert isinstance(stage, OnPolicy), "no other stage has a step of this role"
    scratch = teacher_folder()
    with job_meter() as meter:
        score_windows(
            run,
            stage,
            context.bucket,
            context.provenance,
            context.stopping,
            context.board,
            context.worker,
            TeacherEngine,
            scratch,
            meter.read,
        )
    record_success(context.board)


if __name__ == "__main__":
    main()
