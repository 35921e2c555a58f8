"""How a process reports its end: the class of its failure, its exit code, and a record in the container's
termination message.

The operator reads the record and decides whether to retry.
"""

import errno
import fcntl
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vpmoe.api import Invalid
from vpmoe.api.progress import Progress
from vpmoe.api.termination import EXIT_CODES, TerminationRecord
from vpmoe.provenance import git_sha
from vpmoe.storage.errors import StorageError

log = logging.getLogger(__name__)

EXHAUSTED = {
    errno.ENOSPC: "Free space there, point TMPDIR to a larger disk, or raise the ephemeral storage in "
    "runtime.resources.",
    errno.EDQUOT: "Raise the quota, or point TMPDIR to another disk (in a pod: the ephemeral storage in "
    "runtime.resources).",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    errno.ENFILE: "The node has too many open files.",
    errno.ENOMEM: "Raise the memory in runtime.resources.",
    errno.EIO: "The disk is damaged.",
    errno.EROFS: "Point TMPDIR to a disk that can be written (in a pod the operator does: look for damage of "
    "the node's disk).",
    errno.ESTALE: "The disk of another machine has gone away.",
}
"""What the machine can lack, or have broken, wherever a file is used: by errno, what to do about it."""


HOST_MEMORY = "DefaultCPUAllocator: "
"""torch's words for host memory that it cannot have; their exception is RuntimeError."""
GPU_MEMORY = "CUDA error: out of memory"
"""torch's words for memory that the driver refuses; if its own allocator does, it has OutOfMemoryError."""
GPU_REMEDY = (
    "If another process uses the GPU, keep it away. Otherwise train on more GPUs (student.gpus) or with a "
    "lower training.sequenceLength, and evaluate or score on a GPU with more memory."
)


class Permanent(Exception):
    """An error of configuration or data. A retry cannot succeed."""


class Retriable(Exception):
    """A temporary error, such as an unavailable store or a full node. A retry may succeed."""


class Terminated(Exception):
    """The process was asked to stop (SIGTERM) and has saved what the next attempt needs."""


def classify_error(
    error: BaseException, rank: int | None = None, progress: Progress | None = None
) -> TerminationRecord:
    """The record of a process that an uncaught error ends. `progress` is the last that the process knows."""
    if (of_machine := _explain_machine(error)) is not None:
        error = of_machine
    if isinstance(error, Terminated):
        kind = "Terminated"
    elif isinstance(error, Retriable) or (isinstance(error, StorageError) and error.retriable):
        kind = "Retriable"
    elif isinstance(error, Permanent | StorageError | Invalid):
        kind = "Permanent"
    else:
        kind = "Internal"
    message = str(error) if kind != "Internal" else f"{type(error).__name__}: {error}"
    reason = error.reason if isinstance(error, StorageError) else ""
    return failure_record(kind, message, rank, reason, progress)


def _explain_machine(error: BaseException) -> Exception | None:
    """The error as one of this module's classes, if the machine is at fault and not the code; otherwise None.

    Any line of code that uses memory or a file can meet these, so no caller translates them.
    """
    if isinstance(error, MemoryError) or HOST_MEMORY in str(error):
        return Retriable(f"out of memory ({_first_line(error)}). Raise the memory in runtime.resources.")
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__) or GPU_MEMORY in str(error):
        return Retriable(f"out of GPU memory ({_first_line(error)}). {GPU_REMEDY}")
    if not isinstance(error, OSError) or error.errno is None:
        return None
    where = f"{error.filename}: " if error.filename is not None else ""
    if error.errno in EXHAUSTED:
        return Retriable(f"{where}{error.strerror}. {EXHAUSTED[error.errno]}")
    if not str(error.filename).startswith(tempfile.gettempdir()):
        return None
    if isinstance(error, FileNotFoundError):
        return Retriable(f"{where}it was removed while it was used. Keep other programs out of TMPDIR.")
    return Permanent(f"{where}{error.strerror}. Remove what is there, or point TMPDIR to another folder.")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def failure_record(
    kind: str, message: str, rank: int | None = None, reason: str = "", progress: Progress | None = None
) -> TerminationRecord:
    """The record of a failure of this class. Its exit code follows from the class."""
    return TerminationRecord.model_validate(
        {
            "class": kind,
            "rank": rank,
            "exit": EXIT_CODES[kind],
            "reason": reason,
            "message": message,
            "progress": progress,
        }
    )


def success_record(progress: Progress | None) -> TerminationRecord:
    """The record of a process that has done its work. `progress` is the last that it knows."""
    message = progress.message if progress else ""
    return TerminationRecord(kind="Succeeded", exit=0, message=message, progress=progress)


def termination_log_path(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The file for the termination message: VPMOE_TERMINATION_LOG, else Kubernetes' default if it exists;
    None if not writable."""
    path = Path(environment.get("VPMOE_TERMINATION_LOG", "/dev/termination-log"))
    # os.path answers False where pathlib raises, as for a path that is too long.
    exists, is_file = os.path.exists(path), os.path.isfile(path)  # noqa: PTH110, PTH113
    configured = "VPMOE_TERMINATION_LOG" in environment or is_file
    usable = is_file or (not exists and os.path.isdir(path.parent))  # noqa: PTH112
    return path if configured and usable and os.access(path if exists else path.parent, os.W_OK) else None


def write_record(record: TerminationRecord, overwrite: bool = False) -> None:
    """Write the record of this process as the termination message, if the container has a file for it.

    Several processes of a container share the file. The first failure stays, because it is the cause of the
    others, but it replaces a success. With `overwrite` the record replaces an earlier failure: use it for a
    process that failed first but could not report it. The progress is kept, whichever process knew it. The
    commit of the running code is added.
    """
    path = termination_log_path()
    if path is None:
        return
    try:
        _merge_into(path, record, overwrite)
    except OSError as error:  # the exit code remains
        log.warning("The termination message cannot be written to %s: %s", path, error.strerror)


def _merge_into(path: Path, record: TerminationRecord, overwrite: bool) -> None:
    record = record.model_copy(update={"commit": git_sha() or ""})
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        earlier = TerminationRecord.parse(file.read().decode(errors="replace"))
        if earlier is not None:
            replaces = overwrite or (earlier.kind == "Succeeded" and record.kind != "Succeeded")
            kept, other = (record, earlier) if replaces else (earlier, record)
            record = kept.model_copy(update={"progress": kept.progress or other.progress})
        file.truncate(0)
        file.write(record.to_json_line())


def read_record(path: Path) -> TerminationRecord | None:
    """The record that `write_record` wrote to this file; None if there is none."""
    return TerminationRecord.parse(path.read_text(errors="replace")) if path.is_file() else None
