"""Ranges: which bytes of an object an answer to a ranged GET has. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vpmoe.storage.answers import printable
from vpmoe.storage.errors import Request, StorageError

CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(frozen=True)
class SentRange:
    """Bytes [start, stop) of an object of `size` bytes."""

    start: int
    stop: int
    size: int


def sent_range(request: Request, answer: Mapping[str, Any], start: int, stop: int) -> SentRange:
    """The bytes in boto3's answer to a GET of bytes [start, stop).

    Raises StorageError (Refused) if they are others than those of the range that exist: some servers ignore
    the header Range and send the whole object, which would be taken for the range.
    """
    sent = _stated(request, answer)
    if sent.start == start and sent.stop == min(stop, sent.size):
        return sent
    raise StorageError(
        f"{request.start}: asked for bytes {start} to {stop - 1}, got {sent.start} to {sent.stop - 1} of "
        f"{sent.size}. The store, or a proxy before it, ignores the header Range. Use a store that has "
        "ranged GET.",
        "Refused",
    )


def encoded(request: Request, encoding: str) -> StorageError:
    """The error for content that came in another encoding than it was stored in."""
    return StorageError(
        f"{request.start}: the content is not as it was stored, and the answer's header Content-Encoding is "
        f"{printable(encoding)!r}. A proxy before the store compresses answers: switch that off for it.",
        "Refused",
    )


def _stated(request: Request, answer: Mapping[str, Any]) -> SentRange:
    header = answer.get("ContentRange")
    if header is None:
        size = answer.get("ContentLength")
        if size is None:
            raise StorageError(
                f"{request.start}: the answer has neither Content-Range nor Content-Length. Correct the "
                "proxy before the store, or use another store.",
                "Refused",
            )
        return SentRange(0, size, size)
    found = CONTENT_RANGE.fullmatch(header)
    if found is None:
        raise StorageError(
            f"{request.start}: the header Content-Range of the answer is {printable(header)!r}, which does "
            "not say bytes and size. Correct the proxy before the store, or use another store.",
            "Refused",
        )
    return SentRange(int(found[1]), int(found[2]) + 1, int(found[3]))
