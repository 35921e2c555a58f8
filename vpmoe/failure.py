"""How a process ends when it fails: a class, the exit code that says it, and one line for the container's termination message.

The operator decides from the class whether another attempt makes sense. What to do about a failure is not decided here.
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
"""Kubernetes keeps so many bytes of a container's termination message."""


class Permanent(Exception):
    """Configuration or data that another attempt cannot mend."""


class Retriable(Exception):
    """Something that another attempt may find mended: a store that is away, a node that is full."""


class Terminated(Exception):
    """The process was asked to stop (SIGTERM) and has saved what another attempt needs."""


EXIT = {"Permanent": 65, "Retriable": 75, "Terminated": 143, "Internal": 70}
"""Exit code of each class, after sysexits.h: data error, temporary failure, 128 + SIGTERM, internal software error."""


@dataclass(frozen=True)
class Failure:
    """How a process failed; `rank` is None outside of training."""

    kind: str
    rank: int | None
    exit: int
    message: str

    def line(self) -> bytes:
        """One line of JSON of at most MAX_MESSAGE bytes; a longer message loses its end."""
        line, kept = self._json(self.message), len(self.message)
        while len(line) > MAX_MESSAGE:
            kept -= max(1, (len(line) - MAX_MESSAGE) // 6)  # a character takes at most 6 bytes
            line = self._json(self.message[:kept] + "…")
        return line

    def _json(self, message: str) -> bytes:
        return json.dumps(
            {"class": self.kind, "rank": self.rank, "exit": self.exit, "message": message}, ensure_ascii=False
        ).encode(errors="replace")


def classify(error: BaseException, rank: int | None = None) -> Failure:
    """What an error that ends a process means."""
    kind = "Internal"
    if isinstance(error, Terminated):
        kind = "Terminated"
    elif isinstance(error, Retriable) or (isinstance(error, StorageError) and error.retriable):
        kind = "Retriable"
    elif isinstance(error, Permanent | StorageError | Invalid):
        kind = "Permanent"
    message = str(error) if kind != "Internal" else f"{type(error).__name__}: {error}"
    return Failure(kind, rank, EXIT[kind], message)


def termination_log(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where the termination message goes: VPMOE_TERMINATION_LOG, else Kubernetes' own file where there is one, else nowhere."""
    path = Path(environment.get("VPMOE_TERMINATION_LOG", "/dev/termination-log"))
    wanted = "VPMOE_TERMINATION_LOG" in environment or path.is_file()
    return path if wanted and os.access(path if path.exists() else path.parent, os.W_OK) else None


def record(failure: Failure, path: Path, instead: bool = False) -> None:
    """Write the termination message. The first process of a container to fail has the word: the others fail because it did.

    `instead` takes the word from whoever had it: for one that failed before them and could not say so.
    """
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if instead:
            file.truncate(0)
        if file.seek(0, os.SEEK_END) == 0:
            file.write(failure.line())


def read(path: Path) -> Failure | None:
    """The message that `record` left, None where there is none."""
    text = path.read_bytes() if path.is_file() else b""
    if not text:
        return None
    found = json.loads(text)
    return Failure(found["class"], found["rank"], found["exit"], found["message"])
