"""A file on this machine's disk that appears whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vpmoe.storage.errors import StorageError
from vpmoe.storage.scratch import lock_new, remove_unlocked

REMEDY = "Free space there, or point TMPDIR (in a pod: runtime.resources' ephemeral storage) to more."


@contextmanager
def written_whole(path: Path, size: int, source: str, remedy: str = REMEDY) -> Iterator[BinaryIO]:
    """A temporary file beside `path`, renamed to it when it is written and synced; removed on any error. What
    a process that was killed has left of the same file is removed first. `remedy`: what to do about a full
    disk.

    Raises StorageError (Local) if the disk cannot hold the `size` bytes of `source`.
    """
    temporary: Path | None = None
    try:
        remove_unlocked(found for found in path.parent.iterdir() if found.name.startswith(f".{path.name}."))
        with _locked_file(path) as file:
            temporary = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)  # still locked: otherwise another process may take it for left over
    except OSError as error:
        raise StorageError(
            f"{source}: its {size} bytes cannot be written to {path}: {error.strerror}. {remedy}",
            "Local",
        ) from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def _locked_file(path: Path) -> BinaryIO:
    """A new temporary file beside `path`, locked while it is open."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
        try:
            file = Path(name).open("r+b")  # noqa: SIM115 (open as long as it is locked)
        except FileNotFoundError:  # a process that removes leftovers came between
            continue
        if lock_new(file):
            return file
        file.close()
