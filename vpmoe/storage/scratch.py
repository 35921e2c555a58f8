"""Temporary files on this machine's disk: each process has its own folder, and removes those of dead ones.

A process that is killed with SIGKILL removes nothing, so what is temporary is locked (flock) by the process
that uses it. The kernel releases a lock when its process dies, however it dies. What is there without a lock
is left over, and the next process that starts removes it. Other processes, also of other pods of the node,
may share the disk: what they use is locked, and stays.
"""

import fcntl
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.util import Finalize
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

PREFIX = "vpmoe_"
"""What the names of the folders below TMPDIR begin with. Nothing else may be called so. Names are short,
because paths of sockets below them may have 107 bytes."""
LOCK = ".lock"
"""Suffix of the file beside a folder that the folder's process has locked."""
LAST = -1000
"""Priority of the removal among what multiprocessing does at the end of a process. Its folder has -100."""


def use_own_folder() -> Path:
    """Give this process and those that it starts a temporary folder of their own below TMPDIR, and remove
    those of dead processes. It is removed when the process ends.

    Python's tempfile, and TMPDIR of the processes that it starts, point there afterwards. A process whose
    TMPDIR is such a folder already was started by its owner: it uses that. Raises OSError if TMPDIR cannot be
    written.
    """
    above = Path(tempfile.gettempdir())
    if is_own(above):
        return above
    remove_leftovers(above)
    folder, lock = lock_new_folder(above)
    # Not atexit: multiprocessing would remove its own folder, which is inside this one, afterwards, and fail.
    Finalize(None, _remove, (folder, lock, os.getpid()), exitpriority=LAST)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    return folder


def shared_folder(name: str) -> Path:
    """A folder below TMPDIR for files that a later process reuses, such as a teacher's weights. It is not
    made here."""
    here = Path(tempfile.gettempdir())
    return (here.parent if is_own(here) else here) / name


def is_own(folder: Path) -> bool:
    """Whether a folder is one that `use_own_folder` made."""
    return folder.name.startswith(PREFIX)


@contextmanager
def temporary_folder(above: Path) -> Iterator[Path]:
    """A new empty folder below `above`, removed at the end, and by the next such call if the process is
    killed. Raises OSError if `above` cannot be written."""
    remove_leftovers(above)
    folder, lock = lock_new_folder(above)
    try:
        yield folder
    finally:
        _remove(folder, lock, os.getpid())


def lock_new_folder(above: Path) -> tuple[Path, BinaryIO]:
    """A new empty folder, and its locked file, which must stay open as long as the folder is used."""
    while True:
        folder = above / f"{PREFIX}{secrets.token_hex(2)}"
        try:
            lock = folder.with_suffix(LOCK).open("xb")
        except FileExistsError:
            continue
        if lock_new(lock):
            folder.mkdir(0o700)
            return folder, lock
        lock.close()


def lock_new(file: BinaryIO) -> bool:
    """Lock a file that was just created, for as long as it is open. False if a process that removes leftovers
    came between: the file is gone."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _is_there(file)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, on which no process takes anything for left over
        return True


def remove_leftovers(above: Path) -> None:
    """Remove the folders of dead processes below `above`, with all that they hold."""
    for path in sorted(above.glob(f"{PREFIX}*{LOCK}")):
        if lock := _lock_leftover(path):
            folder = path.with_suffix("")
            log.info("Removing %s, which a process that was killed has left", folder)
            _remove(folder, lock, os.getpid())


def remove_unlocked(paths: Iterable[Path]) -> None:
    """Remove those of these files that no process has locked."""
    for path in sorted(paths):
        if lock := _lock_leftover(path):
            log.info("Removing %s, which a process that was killed has left", path)
            with lock, suppress(OSError):
                path.unlink()


def _lock_leftover(path: Path) -> BinaryIO | None:
    """The file, locked, if its process is dead; None if it lives, or if that cannot be known."""
    with suppress(OSError):
        file = path.open("r+b")
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(file):
                return file
        file.close()
    return None


def _is_there(file: BinaryIO) -> bool:
    """Whether the file's name is still that of this file."""
    with suppress(FileNotFoundError):
        return Path(file.name).stat().st_ino == os.fstat(file.fileno()).st_ino
    return False


def _remove(folder: Path, lock: BinaryIO, owner: int) -> None:
    """Remove a folder, then the file that locks it, if this is the process `owner` and not a fork of it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
        with lock, suppress(OSError):
            Path(lock.name).unlink()
