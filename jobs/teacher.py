"""Score the windows of an OnPolicy stage with the teacher.

All the work is in vpmoe.teacher; this file binds it to a pod, or to a shell.
"""

import tempfile
from pathlib import Path

from jobs.entrypoint import entrypoint
from vpmoe.api.stages import OnPolicy
from vpmoe.inference.teacher_engine import TeacherEngine
from vpmoe.teacher.score_windows import score_windows


def main() -> None:
    """Score this pod's windows."""
    run, context = entrypoint("teacher")
    stage = run.stage_of(context.step)
    assert isinstance(stage, OnPolicy), "no other stage has a step of this role"
    scratch = Path(tempfile.gettempdir()) / "vpmoe-teacher"
    score_windows(
        run,
        stage,
        context.bucket,
        context.provenance,
        context.stopping,
        context.worker,
        TeacherEngine,
        scratch,
    )


if __name__ == "__main__":
    main()
