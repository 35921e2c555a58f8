"""HTTP answers: what one says, and whether an S3 store can have given it. Pure; no network.

A login page, another service and a proxy's error page answer with valid HTTP too. botocore would take some of
them for an empty listing, a stored object or an error of the store, so the client checks every answer
(`check_answer`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from botocore.exceptions import ClientError

LOOKED_AT = 2048
"""Bytes at a body's start that tell what it is."""
QUOTED = 80
"""Characters of an answer's field that a message may quote."""

ROOTS = {
    "ListObjectsV2": "ListBucketResult",
    "CreateMultipartUpload": "InitiateMultipartUploadResult",
    "CompleteMultipartUpload": "CompleteMultipartUploadResult",
}
"""Root element of a successful answer, for the operations whose answer has a body of XML."""
STORING = ("PutObject", "UploadPart")
"""Operations whose successful answer has an ETag, which S3 defines and no other service sends."""
NUMBER = re.compile(rb"[0-9]{1,18}")
SIZES = re.compile(rb"<(?:\w+:)?Size>([^<]*)<")
TRUNCATED = re.compile(rb"<(?:\w+:)?IsTruncated>([^<]*)<")
UPLOAD_ID = re.compile(rb"<(?:\w+:)?UploadId>[^<]")
PAGE = re.compile(rb"<!doctype\s+html|<html", re.IGNORECASE)
TITLE = re.compile(rb"<title[^>]*>(.*?)</title", re.IGNORECASE | re.DOTALL)
ELEMENT = re.compile(rb"<(\w+)>([^<]*)</\1>")
DECLARATION = re.compile(rb"\A(?:<\?.*?\?>|<!--.*?-->|\s)+", re.DOTALL)
ERROR = re.compile(rb"<(?:\w+:)?Error\b")
PLAIN_HTTP = re.compile(
    rb"https server|https port|https scheme|instead use the https|requires? https", re.IGNORECASE
)
"""Words of Go, nginx, Apache and Tomcat if a request to a TLS port is not encrypted."""
OTHER_TYPES = ("text/html", "application/xhtml", "application/json", "application/problem")
"""Content types of which no S3 store sends an error or a listing."""


@dataclass(frozen=True)
class Answer:
    """What an answer that is not the wanted one says.

    code: the S3 error code; empty if the answer names none, as every answer to HEAD. elements: the others of
    S3's error document, such as Region. headers: with names in lower case. title: of an HTML page.
    foreign: whether no S3 store can have given it. needs_tls: whether it says that the port speaks only TLS.
    """

    status: int
    code: str = ""
    elements: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    title: str = ""
    foreign: bool = False
    needs_tls: bool = False

    @property
    def in_short(self) -> str:
        """Status and code, such as "403 AccessDenied"."""
        return f"{self.status} {self.code}".strip()

    @property
    def origin(self) -> str:
        """What identifies the program that answered: the type of its answer, the page's title, the server."""
        kind = self.headers.get("content-type", "").partition(";")[0]
        parts = [
            printable(kind) or "no content type",
            f"title {self.title!r}" if self.title else "",
            f"Server: {printable(server)}" if (server := self.headers.get("server", "")) else "",
        ]
        return ", ".join(part for part in parts if part)

    @property
    def location(self) -> str:
        """Scheme, host and port that a redirect points to; empty if it names no host."""
        try:
            parts = urlsplit(self.headers.get("location", ""))
        except ValueError:
            return ""
        host = parts.netloc.rpartition("@")[2]
        return printable(f"{parts.scheme}://{host}") if parts.scheme and host else ""

    @property
    def region(self) -> str:
        """The region that the answer names as the bucket's."""
        return printable(self.headers.get("x-amz-bucket-region") or self.elements.get("Region", ""))


class UnusableAnswer(Exception):
    """An answer that no S3 store gives, a redirect without a region, or an error behind the status 200, which
    S3 sends before a long operation has ended."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"{answer.status} ({answer.origin})")
        self.answer = answer


def answer_of(error: BaseException) -> Answer | None:
    """The answer that an exception of a boto3 call reports; None if it reports no answer."""
    if isinstance(error, UnusableAnswer):
        return error.answer
    if not isinstance(error, ClientError):
        return None
    about: Mapping[str, Any] = error.response.get("ResponseMetadata", {})
    elements = {name: str(value) for name, value in error.response.get("Error", {}).items()}
    status, code = int(about.get("HTTPStatusCode", 0)), elements.pop("Code", "")
    return Answer(
        status,
        "" if code == str(status) else printable(code),  # botocore's code of an answer without one
        elements,
        {name.lower(): str(value) for name, value in about.get("HTTPHeaders", {}).items()},
    )


def check_answer(operation: str, response: Mapping[str, Any]) -> None:
    """Raise UnusableAnswer if no S3 store can have given this answer. `response` is botocore's, not parsed
    yet."""
    status, body = int(response["status_code"]), response.get("body")
    start = body[:LOOKED_AT].lstrip(b"\xef\xbb\xbf \t\r\n") if isinstance(body, bytes) else b""
    headers = {name.lower(): str(value) for name, value in response["headers"].items()}
    foreign = _no_error(headers, start) if status >= 300 else _no_success(operation, headers, start)
    if status < 300 and not foreign:
        foreign = _no_content(operation, headers, body if isinstance(body, bytes) else b"")
    # botocore asks HEAD for the region of a bucket that moved, and if that is redirected too, for ever.
    elements = _elements(start)
    named = "x-amz-bucket-region" in headers or "Region" in elements
    nowhere = 300 <= status < 400 and not named
    late = status < 300 and ERROR.match(_root(start)) is not None
    if not (foreign or nowhere or late):
        return
    raise UnusableAnswer(
        Answer(
            status,
            "" if foreign else elements.get("Code", ""),
            {} if foreign else elements,
            headers,
            _text(found[1]) if (found := TITLE.search(start)) else "",
            foreign,
            needs_tls=PLAIN_HTTP.search(start) is not None,
        )
    )


def _elements(error: bytes) -> dict[str, str]:
    """The elements without children of an error document."""
    return {name.decode(): _text(value) for name, value in ELEMENT.findall(error)}


def _text(data: bytes) -> str:
    return printable(" ".join(data.decode(errors="replace").split()))


def _no_success(operation: str, headers: Mapping[str, str], start: bytes) -> bool:
    if operation in STORING:
        return not headers.get("etag")
    if operation in ROOTS:
        root = rb"<(?:\w+:)?(?:%s|Error)\b" % ROOTS[operation].encode()
        return re.match(root, _root(start)) is None
    return _other_type(headers) and not (_of_s3(headers) or "etag" in headers or "last-modified" in headers)


def _no_content(operation: str, headers: Mapping[str, str], body: bytes) -> bool:
    """Whether the answer lacks what botocore, or we, would read from it. botocore takes any IsTruncated but
    "true" for the end of a listing."""
    if operation == "HeadObject" or (operation == "GetObject" and "content-length" in headers):
        return NUMBER.fullmatch(headers.get("content-length", "").encode()) is None
    if operation == "ListObjectsV2":
        sizes_valid = all(NUMBER.fullmatch(size) for size in SIZES.findall(body))
        return not sizes_valid or not {*TRUNCATED.findall(body)} <= {b"true", b"false"}
    if operation == "CreateMultipartUpload" and ERROR.match(_root(body[:LOOKED_AT])) is None:
        return UPLOAD_ID.search(body) is None
    return False


def _no_error(headers: Mapping[str, str], start: bytes) -> bool:
    """An error has no body, or S3's error document."""
    if PAGE.search(start):
        return True
    return not _of_s3(headers) and (ERROR.match(_root(start)) is None if start else _other_type(headers))


def _root(document: bytes) -> bytes:
    """An XML document from its root element on."""
    return DECLARATION.sub(b"", document, count=1)


def _of_s3(headers: Mapping[str, str]) -> bool:
    return any(name.startswith(("x-amz-", "x-goog-")) for name in headers)


def _other_type(headers: Mapping[str, str]) -> bool:
    return headers.get("content-type", "").lower().startswith(OTHER_TYPES)


def printable(text: str, limit: int = QUOTED) -> str:
    """Text of others as a message may quote it: one line of at most `limit` printable characters."""
    kept = "".join(character if character.isprintable() else " " for character in text)
    return kept if len(kept) <= limit else kept[:limit] + "…"
