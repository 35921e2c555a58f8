"""The termination record: how a process of a job ended, as one line of JSON in its container's termination
message.

Jobs write it (vpmoe.failure). The operator reads it from the pod's status, so it learns what an attempt came
to although the pod no longer runs.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator
from pydantic_core import from_json

from vpmoe.api.base import AnyText, Record
from vpmoe.api.progress import Commit, Progress

EXIT_CODES: Mapping[str, int] = {"Permanent": 65, "Retriable": 75, "Terminated": 143, "Internal": 70}
"""Exit code of each failure class, from sysexits.h: data error, temporary failure, 128 + SIGTERM, internal
software error."""

WRONG_USAGE = 64
"""Exit code of a command whose command line is wrong: EX_USAGE of sysexits.h."""

RECORD_BYTES = 4096
"""Bytes of a container's termination message that Kubernetes keeps. In a pod of more than three containers it
keeps less: 12 KiB divided by their number."""

MESSAGE_BYTES = 1024
"""Bytes of a longer message that a record has in any case. Parts of the progress are left out for them."""


class TerminationRecord(Record):
    """How a process ended. Records of older versions have neither commit, reason nor progress."""

    kind: Annotated[
        Literal["Succeeded", "Permanent", "Retriable", "Terminated", "Internal"], Field(alias="class")
    ]
    """Succeeded, or the class of the failure: a key of EXIT_CODES."""
    rank: int | None = None
    """The rank of a training process; None for every other process."""
    exit: int | None = None
    """Exit code of the process."""
    commit: Commit = None
    """Commit of the code of the process; empty if its image does not hold it. Absent in records of older
    versions."""
    reason: Annotated[str, Field(max_length=32)] = ""
    """If the bucket caused the failure, how: the reason of a vpmoe.storage.StorageError, such as
    Unreachable."""
    message: AnyText = ""
    """What happened, for people."""
    progress: Progress | None = None
    """The last progress of the attempt, without its conditions."""

    @field_validator("progress", mode="wrap")
    @classmethod
    def _readable(cls, value: Any, validate: Callable[[Any], Progress | None]) -> Progress | None:
        """None for a progress that cannot be read: what is known about the failure must not be lost with
        it."""
        try:
            return validate(value)
        except ValidationError:
            return None

    @classmethod
    def parse(cls, termination_message: str) -> Self | None:
        """The record in the last line of a container's termination message; None if that line is something
        else.

        Without a record, Kubernetes takes the message from the end of the log. A record that Kubernetes has
        cut off is read as far as it goes.
        """
        lines = [line for line in termination_message.split("\n") if line.strip()]
        try:
            return cls.model_validate(from_json(lines[-1], allow_partial=True)) if lines else None
        except ValueError:
            return None

    def to_json_line(self) -> bytes:
        """One line of JSON of at most RECORD_BYTES bytes.

        A longer message is cut off. If MESSAGE_BYTES of it do not fit beside the progress, parts of the
        progress are left out.
        """
        wanted = min(len(_escaped(self.message)), MESSAGE_BYTES)
        for progress in _shortened(self.progress):
            room = RECORD_BYTES - len(self._json("", progress))
            if wanted <= room:
                break
        return self._json(_start_of(self.message, room), progress)

    def _json(self, message: str, progress: Progress | None) -> bytes:
        fields: dict[str, Any] = {"class": self.kind, "rank": self.rank, "exit": self.exit}
        if self.commit is not None:
            fields["commit"] = self.commit
        if self.reason:
            fields["reason"] = self.reason
        fields["message"] = message
        if progress is not None:  # last: the most likely to be cut off
            fields["progress"] = progress.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        return json.dumps(fields, ensure_ascii=False).encode()


def _shortened(progress: Progress | None) -> Iterator[Progress | None]:
    """The progress without its conditions, then with less and less of it."""
    if progress is not None:
        yield progress.model_copy(update={"conditions": ()})
        rest = progress.model_copy(update={"conditions": (), "message": ""})
        yield rest
        for name in ("held_out", "dataset", "checkpoint"):
            rest = rest.model_copy(update={name: None})
            yield rest
    yield None


def _escaped(text: str) -> bytes:
    """The text as it stands in JSON, without quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1].encode()


def _start_of(text: str, room: int) -> str:
    """The text if it takes at most `room` bytes in JSON; otherwise as much of its start as fits, and an
    ellipsis."""
    if len(_escaped(text)) <= room:
        return text
    room -= len("…".encode())
    kept = 0
    while kept < len(text) and (room := room - len(_escaped(text[kept]))) >= 0:
        kept += 1
    return text[:kept] + "…"
