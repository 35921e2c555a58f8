"""The storage error, and the translation of boto3's errors into a cause and a remedy.

Nothing here retries (retries.py) or uses the network. No message holds a credential: only the status and
error code of an answer are quoted, and of an endpoint never its user part.
"""

from typing import Literal
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
    SSLError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

Reason = Literal["Unreachable", "Denied", "Missing", "Refused", "Altered", "Local"]

FAULTS = (BotoCoreError, ClientError, ResponseParserError, HTTPError)
"""All exceptions of a boto3 call, and of reading the body that it returned."""

TRANSIENT = (
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    CredentialRetrievalError,
    ResponseParserError,
    HTTPError,
)
TRANSIENT_CODES = {
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "ConditionalRequestConflict",
    "OperationAborted",
}
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


def shown(endpoint: str) -> str:
    """The endpoint without user and password."""
    parts = urlsplit(endpoint)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def status_and_code(error: Exception) -> tuple[int, str]:
    """HTTP status and S3 error code of an answer; (0, "") for an error that is not an answer. HEAD has the
    status as its code."""
    if not isinstance(error, ClientError):
        return 0, ""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)), error.response.get(
        "Error", {}
    ).get("Code", "")


def in_short(error: Exception) -> str:
    """The cause in a word or two: the store's answer, or the kind of fault."""
    status, code = status_and_code(error)
    return f"{status} {code}".removesuffix(f" {status}").strip() if status else type(error).__name__


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, ClientError):
        status, code = status_and_code(error)
        return (status >= 500 and status != 501) or status in (408, 429) or code in TRANSIENT_CODES
    return isinstance(error, TRANSIENT)


def explain(error: Exception, operation: str, url: str, endpoint: str, tried: str) -> StorageError:
    """The error for a failed operation. `tried` says how often and for how long, e.g. "10 times in 61 s"."""
    (status, code), answer = status_and_code(error), in_short(error)
    start = f"{url}: {operation} at {endpoint}"
    if isinstance(error, NO_CREDENTIALS):
        return StorageError(
            f"{start}: no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; a pod has them from "
            "the Secret that "
            "storage.credentialsSecret names, or from its service account's identity.",
            "Denied",
        )
    if not status and not is_transient(error):
        return StorageError(f"{start} could not be asked for ({answer}: {error}).", "Refused")
    if is_transient(error):
        hint = "the store is up and can be reached from here"
        if isinstance(error, SSLError):
            hint = "storage.caSecret (or AWS_CA_BUNDLE) holds the certificate of its authority"
        return StorageError(
            f"{start} failed {tried}, last with {answer}. Check that storage.endpoint is right and that "
            f"{hint}.",
            "Unreachable",
        )
    if code == "NoSuchBucket":
        return StorageError(
            f"{start}: the bucket does not exist. Create it, or correct storage.bucket and storage.endpoint.",
            "Missing",
        )
    denied = (
        status in (401, 403) or code == "XAdminUserNotFound"
    )  # versitygw's word for an unknown access key, with status 404
    if status == 404 and not denied:
        return StorageError(f"{start}: there is no such object ({answer}).", "Missing")
    if status in (301, 307) or code in ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        return StorageError(
            f"{start}: the bucket lies in another region ({answer}). Correct storage.region or "
            "storage.endpoint.",
            "Refused",
        )
    if code == "RequestTimeTooSkewed":
        return StorageError(
            f"{start}: this machine's clock and the store's differ too much. Set the clock.", "Denied"
        )
    if denied:
        return StorageError(
            f"{start} was denied ({answer}). Check that AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (in a "
            "pod: the Secret that "
            "storage.credentialsSecret names) belong to this store and may list, read, write and delete in "
            "this bucket.",
            "Denied",
        )
    return StorageError(
        f"{start} was refused ({answer}). The store may lack what we use: plain and multipart PUT, ranged "
        "GET, HEAD, LIST, DELETE, "
        "If-None-Match on PUT; storage.addressingStyle may be wrong for it.",
        "Refused",
    )
