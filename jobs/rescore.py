"""Score a dataset's picked documents with the teacher.

All the work is in vpmoe.teacher; this file binds it to a pod, or to a shell.
"""

from jobs.entrypoint import entrypoint, record_success
from vpmoe.inference.teacher_engine import TeacherEngine
from vpmoe.process.gpu import job_meter
from vpmoe.teacher.folder import teacher_folder
from vpmoe.teacher.rescore import rescore


def main() -> None:
    """Score this pod's parts."""
    run, context = entrypoint("rescore")
    scratch = teacher_folder()
    with job_meter() as meter:
        rescore(
            run,
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
