"""Score a dataset's picked documents with the teacher.

All the work is in vpmoe.teacher; this file binds it to a pod, or to a shell.
"""

import tempfile
from pathlib import Path

from jobs.entrypoint import entrypoint
from vpmoe.inference.teacher_engine import TeacherEngine
from vpmoe.teacher.rescore import rescore


def main() -> None:
    """Score this pod's parts."""
    run, context = entrypoint("rescore")
    scratch = Path(tempfile.gettempdir()) / "vpmoe-teacher"
    rescore(run, context.bucket, context.provenance, context.stopping, context.worker, TeacherEngine, scratch)


if __name__ == "__main__":
    main()
