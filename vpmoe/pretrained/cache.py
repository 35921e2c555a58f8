"""Keeps a model's files on a disk: whole, verified, and shared by the processes that need them.

The disk is the pod's own, or a volume that pods of several runs share. Each model has there

    <name>/         its files. Each appears whole: it is written under another name, synced, and renamed
    <name>.json     size and sha256 of each block (8 MiB) of every file that was downloaded
    <name>.lock     locked by the process that downloads

A process reads all files before it uses them, and downloads again what is missing, cut or altered. Where
files come from is in model_files.py and hub.py.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpmoe.failure import Permanent
from vpmoe.storage import BLOCK, StorageError
from vpmoe.storage.blocks import in_order
from vpmoe.storage.local import written_whole

log = logging.getLogger(__name__)

THREADS = 16
"""Blocks of a file that are read or downloaded at the same time."""
PAUSE = 1.0
"""Seconds between two looks whether another process has finished its download."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system without locks answers."""
DAMAGED = (errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""What vpmoe.failure explains for every file."""
FULL = (errno.ENOSPC, errno.EDQUOT)
FILE_MODE, FOLDER_MODE = 0o664, 0o775
"""Pods of one group share the volume: those that train with capabilities run as another user."""

Blocks = tuple[str, ...]
"""sha256, in hex, of each block of a file."""
Download = Callable[[list[str], Path], Iterator[tuple[str, Blocks]]]
"""`download(names, directory)` writes these files into the directory, whole, and yields each when it is
there."""


@dataclass(frozen=True)
class Purpose:
    """What a model is for, in messages."""

    field: str
    """Field of the specification that names the model."""
    name: str
    """What the model is to the run, such as "the teacher"."""
    if_full: str
    """What to do if the disk is full."""
    if_read_only: str
    """What to do if files are missing in a folder that cannot be written."""


def complete(
    purpose: Purpose,
    folder: Path,
    name: str,
    sizes: Mapping[str, int],
    download: Download,
    check_stop: Callable[[], None],
) -> Path:
    """The directory `name` below `folder` with all files of `sizes`, each of as many bytes. Downloads those
    that are missing or damaged.

    `check_stop` is called for every block that is read, and while another process downloads; it may raise.
    Raises Permanent if the folder cannot be written, and StorageError (Local) if the disk is full.
    """
    directory, record = folder / name, folder / f"{name}.json"
    with _explained(purpose, directory):
        damaged = find_damaged(directory, sizes, read_record(record), check_stop)
        if not damaged:
            log.info("All %d files of %s are in %s", len(sizes), purpose.name, directory)
            return directory
        directory.mkdir(parents=True, exist_ok=True)
        _share(directory, FOLDER_MODE)
        with _locked(folder / f"{name}.lock", purpose, check_stop):
            known = read_record(record)  # another process may have downloaded files meanwhile
            damaged = find_damaged(directory, {file: sizes[file] for file in damaged}, known, check_stop)
            for file in damaged:
                (directory / file).unlink(missing_ok=True)
                known.pop(file, None)
            _check_space(purpose, directory, sum(sizes[file] for file in damaged))
            for file, blocks in download(list(damaged), directory) if damaged else ():
                _share(directory / file, FILE_MODE)
                known[file] = {"size": (directory / file).stat().st_size, "blocks": list(blocks)}
                _write_record(record, known, purpose)
    return directory


def find_damaged(
    directory: Path,
    sizes: Mapping[str, int],
    known: Mapping[str, Any],
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """The files of `sizes` that are not in the directory as they were downloaded, and what is wrong with
    each. Reads all others."""
    found = {}
    for file, size in sizes.items():
        fault = _fault(directory / file, size, known.get(file), check_stop)
        if fault:
            found[file] = fault
            if fault != MISSING:
                log.warning("%s %s. It is downloaded again", directory / file, fault)
    return found


MISSING = "is missing"


def _fault(path: Path, size: int, recorded: Any, check_stop: Callable[[], None]) -> str:
    """What is wrong with a file; empty if nothing is."""
    if not path.is_file():
        return MISSING
    if recorded is None:
        return "is in no record of downloads"
    length = path.stat().st_size
    if length != recorded["size"] or (size and length != size):
        return f"has {length} bytes, not {size or recorded['size']}"
    for index, found in enumerate(hash_file(path, check_stop)):
        if found != recorded["blocks"][index]:
            return f"was altered: the sha256 of bytes {index * BLOCK} to {(index + 1) * BLOCK} is another"
    return ""


def hash_file(path: Path, check_stop: Callable[[], None] = lambda: None) -> Iterator[str]:
    """sha256, in hex, of each block of a file."""
    with path.open("rb") as file:

        def block(index: int) -> str:
            check_stop()
            return hashlib.sha256(os.pread(file.fileno(), BLOCK, index * BLOCK)).hexdigest()

        yield from in_order(block, range(-(-os.fstat(file.fileno()).st_size // BLOCK)), THREADS)


def hash_synced(path: Path) -> Blocks:
    """The hashes of a file that another library has written, after it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return tuple(hash_file(path))


def read_record(path: Path) -> dict[str, Any]:
    """Size and blocks by file; empty if there is no record, or if it was altered."""
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        for size, blocks in ((entry["size"], entry["blocks"]) for entry in found.values()):
            if type(size) is not int or len(blocks) != -(-size // BLOCK):
                raise ValueError(f"{len(blocks)} blocks for {size} bytes")
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.warning("%s is not what was written, so the files are downloaded again: %s", path, error)
        return {}
    return found


def _write_record(path: Path, known: Mapping[str, Any], purpose: Purpose) -> None:
    data = json.dumps(known, sort_keys=True).encode()
    with written_whole(path, len(data), str(path), purpose.if_full) as file:
        file.write(data)
    _share(path, FILE_MODE)


def write_blocks(
    path: Path, size: int, source: str, blocks: Iterable[tuple[bytes, str]], if_full: str
) -> Blocks:
    """Write a file, whole, from blocks and their hashes. Returns the hashes. `if_full`: what to do if the
    disk is full."""
    hashes = []
    with written_whole(path, size, source, if_full) as file:
        for data, sha256 in blocks:
            file.write(data)
            hashes.append(sha256)
    return tuple(hashes)


def _share(path: Path, mode: int) -> None:
    with suppress(PermissionError):  # of another user, who has done so
        path.chmod(mode)


@contextmanager
def _locked(path: Path, purpose: Purpose, check_stop: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a model. The kernel, or the file server, releases that of a process that died."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, FILE_MODE)
    try:
        _share(path, FILE_MODE)
        waits = False
        while not _lock(descriptor, path):
            if not waits:
                log.info("Waiting: another process downloads %s (it has locked %s)", purpose.name, path)
            waits = True
            check_stop()
            time.sleep(PAUSE)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    """Lock the file; False if another process has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s: this file system has no locks, so processes may download the same files", path)
    return True


def _check_space(purpose: Purpose, directory: Path, needed: int) -> None:
    """Raise StorageError (Local) if the disk has not as many bytes left."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise StorageError(
            f"{directory}: the files of {purpose.field} that are missing need {needed} bytes, and {free} are "
            f"free. {purpose.if_full}",
            "Local",
        )


@contextmanager
def _explained(purpose: Purpose, directory: Path) -> Iterator[None]:
    """Translate the errors of a disk that is full, or where files cannot be read or written."""
    try:
        yield
    except OSError as error:
        why = f"{purpose.field}: {error.filename or directory}: {error.strerror}"
        if error.errno in FULL:
            raise StorageError(f"{why}. {purpose.if_full}", "Local") from error
        if error.errno in DAMAGED:
            raise
        raise Permanent(
            f"{why}, and files of {purpose.name} are missing in {directory}. {purpose.if_read_only}"
        ) from error
