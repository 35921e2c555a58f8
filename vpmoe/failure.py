"""How a process reports that it failed: a failure class, its exit code, and one line in the container's
termination message.

The operator reads the class and decides whether to retry.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vpmoe.api import Invalid
from vpmoe.storage.errors import StorageError

MAX_MESSAGE = 4096
"""Bytes of a container's termination message that Kubernetes keeps."""


class Permanent(Exception):
    """An error of configuration or data. A retry cannot succeed."""


class Retriable(Exception):
    """A temporary error, such as an unavailable store or a full node. A retry may succeed."""


class Terminated(Exception):
    """The process was asked to stop (SIGTERM) and has saved what the next attempt needs."""


EXIT_CODES = {"Permanent": 65, "Retriable": 75, "Terminated": 143, "Internal": 70}
"""Exit code of each failure class, from sysexits.h: data error, temporary failure, 128 + SIGTERM, internal
software error."""


@dataclass(frozen=True)
class Failure:
    """How a process failed. In the termination message `kind` is "class" and `exit_code` is "exit"."""

    kind: str
    """A key of EXIT_CODES."""
    rank: int | None
    """None outside of training."""
    exit_code: int
    message: str

    def to_json_line(self) -> bytes:
        """One line of JSON of at most MAX_MESSAGE bytes; the end of a longer message is cut off."""
        line, kept = self._json(self.message), len(self.message)
        while len(line) > MAX_MESSAGE:
            kept -= max(1, (len(line) - MAX_MESSAGE) // 6)  # a character takes at most 6 bytes
            line = self._json(self.message[:kept] + "…")
        return line

    def _json(self, message: str) -> bytes:
        return json.dumps(
            {"class": self.kind, "rank": self.rank, "exit": self.exit_code, "message": message},
            ensure_ascii=False,
        ).encode(errors="replace")


def classify_error(error: BaseException, rank: int | None = None) -> Failure:
    """The failure that an uncaught error means."""
    kind = "Internal"
    if isinstance(error, Terminated):
        kind = "Terminated"
    elif isinstance(error, Retriable) or (isinstance(error, StorageError) and error.retriable):
        kind = "Retriable"
    elif isinstance(error, Permanent | StorageError | Invalid):
        kind = "Permanent"
    message = str(error) if kind != "Internal" else f"{type(error).__name__}: {error}"
    return Failure(kind, rank, EXIT_CODES[kind], message)


def termination_log_path(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The file for the termination message: VPMOE_TERMINATION_LOG, else Kubernetes' default if it exists;
    None if not writable."""
    path = Path(environment.get("VPMOE_TERMINATION_LOG", "/dev/termination-log"))
    configured = "VPMOE_TERMINATION_LOG" in environment or path.is_file()
    return path if configured and os.access(path if path.exists() else path.parent, os.W_OK) else None


def write_termination_message(failure: Failure, path: Path, overwrite: bool = False) -> None:
    """Write the termination message, unless another process of the container has written one.

    The first failure is the cause of the others. With `overwrite` the message replaces an earlier one: use it
    for a process that failed first but could not report it.
    """
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if overwrite:
            file.truncate(0)
        if file.seek(0, os.SEEK_END) == 0:
            file.write(failure.to_json_line())


def read_termination_message(path: Path) -> Failure | None:
    """The message that `write_termination_message` wrote; None if there is none."""
    text = path.read_bytes() if path.is_file() else b""
    if not text:
        return None
    found = json.loads(text)
    return Failure(found["class"], found["rank"], found["exit"], found["message"])
