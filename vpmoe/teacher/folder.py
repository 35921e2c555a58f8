"""Where a process keeps a teacher's files, and what to do if they cannot be kept there."""

import os
from pathlib import Path

from vpmoe.pretrained.cache import Purpose
from vpmoe.storage.scratch import shared_folder

VARIABLE = "VPMOE_TEACHER_CACHE"
"""Variable of pods with runtime.teacherCache: where its volume is mounted."""
FIELD = "teacher.model"


def teacher_folder() -> Path:
    """The folder of this process for teachers: the volume of runtime.teacherCache, or one below TMPDIR."""
    volume = os.environ.get(VARIABLE)
    return Path(volume) if volume else shared_folder("vpmoe-teacher")


def teacher_in(folder: Path) -> Purpose:
    """A teacher whose files are below `folder`."""
    if os.environ.get(VARIABLE) == str(folder):
        return Purpose(
            FIELD,
            "the teacher",
            if_full="Enlarge the claim of runtime.teacherCache, or delete the folders in it of teachers that "
            "no run uses any more.",
            if_read_only="The pods must be able to write the claim of runtime.teacherCache (user and group "
            "65532) as long as it lacks files. Change the claim, or fill it by a run that may write.",
        )
    return Purpose(
        FIELD,
        "the teacher",
        if_full="Free space there, or point TMPDIR to more (in a pod: raise the ephemeral-storage in "
        "runtime.resources, or name a claim in runtime.teacherCache).",
        if_read_only="Point TMPDIR to a disk that can be written (in a pod: name a claim in "
        "runtime.teacherCache).",
    )
