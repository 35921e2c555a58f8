"""The storage error, and the translation of boto3's errors into a cause and a remedy.

causes.py has the causes of the store's answers, connections.py those of missing answers. Nothing here retries
(retries.py) or uses the network. No message holds a credential: of an answer only status, code and type are
quoted, and of an address never its user part or query.
"""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from vpmoe.storage.answers import UnusableAnswer, answer_of, printable
from vpmoe.storage.causes import RIGHTS, Reason, cause_of
from vpmoe.storage.connections import connection_fault
from vpmoe.storage.listing import ListingFault

PASSWORD = re.compile(r"(://)[^/\s]*@")
"""The user's part of a URL in a text."""

KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


class Incomplete(Exception):
    """A body that ended early although its answer was well-formed."""


UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, EOFError)
"""Faults of what credentials are read from: the file with a service account's token; a terminal, for the code
of a second factor, that is not there."""

FAULTS = (
    BotoCoreError,
    ClientError,
    ResponseParserError,
    HTTPError,
    UnusableAnswer,
    Incomplete,
    ListingFault,
    *UNREADABLE,
)
"""All exceptions of a boto3 call, and of reading the body that it returned."""

TRANSIENT = (
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    CredentialRetrievalError,
    ResponseParserError,
    HTTPError,
    Incomplete,
)
NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError)


class StorageError(Exception):
    """An operation on the bucket that failed. The message names object, endpoint, what was tried and the
    remedy.

    reason: Unreachable (no answer, or only temporary errors, until the retries ended), Denied (credentials),
    Missing (bucket or object), Refused (any other answer of the store), Altered (content differs from what
    was written), Local (this machine's disk).
    """

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason: Reason = reason

    @property
    def retriable(self) -> bool:
        """Whether a later attempt, perhaps on another node, may succeed without a change by a person."""
        return self.reason in ("Unreachable", "Local")


@dataclass(frozen=True)
class Request:
    """What was asked of the store, for messages.

    operation: name in S3's API. url: of the object or prefix. endpoint: without a password. field: the field
    of the run that names the bucket. region: that the request is signed for.
    """

    operation: str
    url: str
    endpoint: str
    field: str
    region: str

    @property
    def start(self) -> str:
        """How a message about it begins."""
        return f"{self.url}: {self.operation} at {self.endpoint}"


def shown(endpoint: str) -> str:
    """The endpoint without user and password."""
    parts = urlsplit(endpoint)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def status_and_code(error: Exception) -> tuple[int, str]:
    """HTTP status and S3 error code of an answer; (0, "") for an error that is not an answer. The code is
    empty if the answer names none."""
    answer = answer_of(error)
    return (answer.status, answer.code) if answer else (0, "")


def in_short(error: Exception) -> str:
    """The cause in a few words: the store's answer, or the kind of fault."""
    answer = answer_of(error)
    if answer:
        foreign = answer.foreign and answer.status >= 500
        return (
            f"{answer.in_short} of a proxy or another service ({answer.origin})"
            if foreign
            else answer.in_short
        )
    fault, address = connection_fault(error), getattr(error, "kwargs", {}).get("endpoint_url", "")
    server = printable(urlsplit(str(address)).netloc.rpartition("@")[2])
    return type(error).__name__ + (f" ({f'{server}: ' if server else ''}{fault.what})" if fault else "")


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    answer = answer_of(error)
    if answer:
        return cause_of(answer, "", "", "", "").again
    fault = connection_fault(error)
    if _of_own_program(error) or (fault and fault.lasting):
        return False
    return isinstance(error, TRANSIENT)


def explain(error: Exception, request: Request, tried: str) -> StorageError:
    """The error for a failed request. `tried` says how often and for how long, e.g. "10 times in 61 s"."""
    start = request.start
    answer = answer_of(error)
    if isinstance(error, ClientError) and error.operation_name not in (*RIGHTS, "HeadBucket"):
        return _no_identity(start, f"{error.operation_name}: {in_short(error)}", is_transient(error))
    if answer:
        cause = cause_of(answer, request.operation, request.endpoint, request.field, request.region)
        what = f"failed {tried}, last with {in_short(error)}{cause.what}" if cause.again else cause.what
        return StorageError(
            f"{start}{'' if what.startswith(':') else ' '}{what}. {cause.remedy}", cause.reason
        )
    return _without_answer(error, start, tried)


def _without_answer(error: Exception, start: str, tried: str) -> StorageError:
    fault = connection_fault(error)
    if isinstance(error, NO_CREDENTIALS):
        return StorageError(
            f"{start}: no credentials. Set {KEYS}; a pod has them from the Secret that "
            "storage.credentialsSecret names, or from its service account's identity.",
            "Denied",
        )
    if isinstance(error, ListingFault):
        return StorageError(
            f"{start}: the store lists wrongly: {error}. Use a store, or a version of it, that implements "
            "LIST version 2 (prefix, start-after and continuation-token).",
            "Refused",
        )
    if fault and fault.lasting:
        return StorageError(f"{start}: {fault.what}. {fault.remedy}", "Refused")
    if is_transient(error):
        remedy = (fault.remedy if fault else "") or (
            "Check that storage.endpoint is right and that the store is up and can be reached from here."
        )
        return StorageError(f"{start} failed {tried}, last with {in_short(error)}. {remedy}", "Unreachable")
    if isinstance(error, UNREADABLE) or _about_credentials(error):
        return _no_identity(start, f"{type(error).__name__}: {quoted(error)}", transient=False)
    return StorageError(
        f"{start} could not be asked for ({type(error).__name__}: {quoted(error)}).", "Refused"
    )


def _no_identity(start: str, why: str, transient: bool) -> StorageError:
    return StorageError(
        f"{start}: no credentials could be had ({why}). Check the AWS_* variables, the files that they and "
        "AWS_PROFILE name, and in a pod the Secret that storage.credentialsSecret names, or the identity of "
        "its service account.",
        "Unreachable" if transient else "Denied",
    )


def _about_credentials(error: Exception) -> bool:
    return isinstance(error, CredentialRetrievalError) or any(
        word in type(error).__name__
        for word in ("Credential", "Token", "SSO", "Profile", "Config", "MFA", "Login")
    )


def _of_own_program(error: Exception) -> bool:
    """Whether a program of this machine (credential_process) was to give the credentials."""
    return isinstance(error, CredentialRetrievalError) and error.kwargs.get("provider") == "custom-process"


def quoted(error: Exception) -> str:
    """The text of an exception of this machine's configuration, bounded and without passwords."""
    text = PASSWORD.sub(r"\1", str(error))
    return printable("its credential_process failed" if _of_own_program(error) else text, 240)
