"""What an answer of the store means for the run: a cause, whether to ask again, and a remedy. Pure."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

from vpmoe.storage.answers import Answer, printable

type Reason = Literal["Unreachable", "Denied", "Missing", "Refused", "Altered", "Local"]

SLOWER = {"SlowDown", "Throttling", "ThrottlingException"}
"""Codes that ask for fewer requests."""
AGAIN = SLOWER | {"RequestTimeout", "ConditionalRequestConflict", "OperationAborted"}
"""Codes of temporary errors that have another status than temporary errors have."""
SPOILED = {"XAmzContentSHA256Mismatch", "BadDigest", "IncompleteBody"}
"""Codes for a body that reached the store in another form than it was sent."""
TOKEN = re.compile(
    r"ExpiredToken|InvalidToken|TokenRefreshRequired|TokenExpired|InvalidClientTokenId", re.IGNORECASE
)
TOKEN_TEXT = re.compile(r"\btoken\b.*\bexpired\b", re.IGNORECASE)
CLOCK = re.compile(r"RequestTimeTooSkewed|RequestExpired|RequestInTheFuture", re.IGNORECASE)
CLOCK_TEXT = re.compile(
    r"request has expired|signature expired|signature not yet current|time.*too skewed", re.IGNORECASE
)
ARCHIVED = re.compile(r"InvalidObjectState|Archived|ObjectInGlacier|ObjectNotRestored", re.IGNORECASE)
QUOTA = re.compile(r"quota|toomanyobjects|EDQUOT", re.IGNORECASE)
FULL = re.compile(
    r"storage(is)?full|diskfull|bucketfull|insufficient(storage|capacity|space)|nospace|outofspace|notenoughspace|ENOSPC",
    re.IGNORECASE,
)
FULL_TEXT = re.compile(
    r"no space left|disk (is )?full|storage (is )?full|(insufficient|out of|not enough) (disk |storage )?"
    r"space|insufficient storage|free drive threshold",
    re.IGNORECASE,
)
QUOTA_TEXT = re.compile(r"\bquota\b.*(exceed|reach|full)|exceed\w* .*\bquota\b|\bEDQUOT\b", re.IGNORECASE)
REGION = {
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "PermanentRedirect",
    "InvalidRegion",
}
LOGIN_STATUS = 511
"""Network Authentication Required."""

RIGHTS = {
    "ListObjectsV2": "s3:ListBucket",
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
}
"""The right that a policy must give for an operation."""


@dataclass(frozen=True)
class Cause:
    """what: follows the operation in a message. again: whether the same request may succeed a little later;
    then `what` follows "failed … times, last with <answer>"."""

    reason: Reason
    what: str
    remedy: str
    again: bool = False


@dataclass(frozen=True)
class Asked:
    """The request: S3 operation, the header that makes it conditional, endpoint, the field of the run that
    names the bucket, and the region that it is signed for."""

    operation: str
    condition: str
    endpoint: str
    field: str
    region: str


def cause_of(answer: Answer, operation: str, endpoint: str, field: str, region: str) -> Cause:
    """The cause of an answer to `operation` on the bucket that `field` of the run names, signed for
    `region`."""
    name, _, condition = operation.partition(" with ")
    asked = Asked(name, condition, endpoint, field, region)
    return next(cause for rule in RULES if (cause := rule(answer, asked)))


def _tls(answer: Answer, asked: Asked) -> Cause | None:
    if not answer.needs_tls:
        return None
    return Cause(
        "Refused",
        f"was refused ({answer.in_short}): the port speaks TLS",
        "The endpoint is https: write storage.endpoint as https://….",
    )


def _redirect(answer: Answer, asked: Asked) -> Cause | None:
    if not 300 <= answer.status < 400:
        return None
    target, endpoint = answer.location, printable(answer.elements.get("Endpoint", ""))
    if asked.endpoint.startswith("http://") and target.startswith("https://"):
        return Cause(
            "Refused",
            f"was redirected to {target} ({answer.in_short})",
            f"The endpoint is https: write storage.endpoint as https://… if {target} is the store. If it is "
            "a login page, a proxy answers: name the endpoint's host in NO_PROXY (in a pod: runtime.env).",
        )
    if answer.region:
        return _other_region(answer, asked)
    if answer.foreign or answer.headers.get("location"):
        return Cause(
            "Refused",
            f"was redirected to {target or 'another address'} ({answer.in_short})",
            "If that is the store, write it into storage.endpoint. If it is a login page, a proxy answers: "
            "name the endpoint's host in NO_PROXY (in a pod: runtime.env).",
        )
    return Cause(
        "Refused",
        f": the bucket lies in another region or at another endpoint ({answer.in_short})",
        f"Correct storage.region or storage.endpoint{f' (the store names {endpoint})' if endpoint else ''}.",
    )


def _region(answer: Answer, asked: Asked) -> Cause | None:
    if answer.code not in REGION:
        return None
    return _other_region(answer, asked)


def _other_region(answer: Answer, asked: Asked) -> Cause:
    named = f", {answer.region}" if answer.region else ""
    if answer.region == asked.region:
        remedy = (
            "storage.region is that already, so the store or a proxy before it redirects wrongly: correct "
            "storage.endpoint."
        )
    elif answer.region:
        remedy = (
            f"Set storage.region to {answer.region}, and storage.endpoint to that region's if it names one."
        )
    else:
        remedy = "Correct storage.region or storage.endpoint."
    return Cause("Refused", f": the bucket lies in another region{named} ({answer.in_short})", remedy)


def _token(answer: Answer, asked: Asked) -> Cause | None:
    if not (TOKEN.search(answer.code) or TOKEN_TEXT.search(answer.elements.get("Message", ""))):
        return None
    what = "the token has expired"
    if "expired" not in answer.code.lower() and answer.code != "TokenRefreshRequired":
        what += ", or is not one of this store and these keys"
    return Cause(
        "Denied",
        f"was denied: {what} ({answer.in_short})",
        "Get new credentials: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN belong "
        "together. In a pod they are keys of the Secret that storage.credentialsSecret names: put keys there "
        "that do not expire, without AWS_SESSION_TOKEN, or use the identity of the service account, whose "
        "tokens are renewed.",
    )


def _clock(answer: Answer, asked: Asked) -> Cause | None:
    if not (CLOCK.search(answer.code) or CLOCK_TEXT.search(answer.elements.get("Message", ""))):
        return None
    return Cause(
        "Denied",
        f": this machine's clock and the store's differ too much ({answer.in_short}{_difference(answer)})",
        "Set the clock of the node, or the store's.",
    )


def _difference(answer: Answer) -> str:
    """How far this machine's clock is from the date of the answer."""
    try:
        there = parsedate_to_datetime(answer.headers.get("date", ""))
        seconds = round((datetime.now(UTC) - there).total_seconds())
    except (ValueError, TypeError):
        return ""
    if abs(seconds) < 60:
        return ""
    return f"; here it is {abs(seconds)} s {'later' if seconds > 0 else 'earlier'} than its answer's date"


def _archived(answer: Answer, asked: Asked) -> Cause | None:
    if not ARCHIVED.search(answer.code):
        return None
    kind = printable(answer.elements.get("StorageClass") or answer.headers.get("x-amz-storage-class", ""))
    return Cause(
        "Refused",
        f": the object is archived{f' (storage class {kind})' if kind else ''} and cannot be read "
        f"({answer.in_short})",
        "Restore it (aws s3api restore-object), or copy it to a storage class without restoring, and keep "
        "lifecycle rules away from what runs read.",
    )


def _full(answer: Answer, asked: Asked) -> Cause | None:
    text = answer.elements.get("Message", "")
    if answer.status == 429 or answer.code in AGAIN or "rate" in answer.code.lower():
        return None
    quota = QUOTA.search(answer.code) or QUOTA_TEXT.search(text)
    if not (quota or answer.status == 507 or FULL.search(answer.code) or FULL_TEXT.search(text)):
        return None
    what = "a quota of the store is used up" if quota else "the store is full"
    return Cause(
        "Refused",
        f"was refused: {what} ({answer.in_short})",
        f"Free space or have the {'quota' if quota else 'store'} enlarged, then start the run again: what it "
        "has finished is kept.",
    )


def _bucket(answer: Answer, asked: Asked) -> Cause | None:
    field = asked.field
    if answer.code == "NoSuchBucket":
        create = "Create it, or correct" if field == "storage.bucket" else "Correct"
        return Cause(
            "Missing",
            f"was answered {answer.in_short}: the bucket does not exist",
            f"{create} {field} or storage.endpoint.",
        )
    if answer.code == "InvalidBucketName":
        return Cause(
            "Refused",
            f": the store accepts no bucket of this name ({answer.in_short})",
            f"Correct {field}.",
        )
    return None


def _proxy_login(answer: Answer, asked: Asked) -> Cause | None:
    if answer.status not in (407, LOGIN_STATUS):
        return None
    return Cause(
        "Refused",
        f"was refused: a proxy between here and the store wants a login ({answer.in_short}, {answer.origin})",
        "Write its user and password into HTTP_PROXY and HTTPS_PROXY (in a pod: of a Secret, by "
        "runtime.env's valueFrom or runtime.envFrom), or name the endpoint's host in NO_PROXY.",
    )


def _too_large(answer: Answer, asked: Asked) -> Cause | None:
    if answer.status != 413 and answer.code != "EntityTooLarge":
        return None
    return Cause(
        "Refused",
        f"was refused: the body is too large ({answer.in_short}, {answer.origin})",
        "We send at most 8 MiB at once. Raise the limit of the store or of the proxy before it (nginx: "
        "client_max_body_size).",
    )


def _foreign(answer: Answer, asked: Asked) -> Cause | None:
    if not answer.foreign or _temporary(answer):
        return None
    origin = f"{answer.in_short}, {answer.origin}"
    if answer.status < 300 and not answer.title and "html" not in answer.headers.get("content-type", ""):
        lacks = "an ETag" if asked.operation in ("PutObject", "UploadPart") else "S3's content"
        return Cause(
            "Refused",
            f"was answered without {lacks} ({origin})",
            "Another service than S3 answers at storage.endpoint, or a proxy before it changes its answers: "
            "correct the endpoint or the proxy.",
        )
    return Cause(
        "Refused",
        f"was not answered by an S3 store ({origin})",
        "Another service or the login page of a proxy answers at storage.endpoint. Correct the endpoint "
        "(host and port of the S3 API, not of a console), or name its host in NO_PROXY (in a pod: "
        "runtime.env).",
    )


def _denied(answer: Answer, asked: Asked) -> Cause | None:
    unknown_key = answer.code == "XAdminUserNotFound"  # versitygw's word, with status 404
    if answer.status not in (401, 403) and not unknown_key:
        return None
    right = RIGHTS.get(asked.operation, "")
    may = (
        "may list, read, write and delete in this bucket"
        if asked.field == "storage.bucket"
        else (f"may list and read in this bucket ({asked.field})")
    )
    return Cause(
        "Denied",
        f"was denied ({answer.in_short})",
        "Check that AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (in a pod: the Secret that "
        f"storage.credentialsSecret names) belong to this store and {may}"
        + (f"; this request needs {right}." if right else ".")
        + (" A proxy that changes the request has the same effect." if "Signature" in answer.code else ""),
    )


def _missing(answer: Answer, asked: Asked) -> Cause | None:
    if answer.code == "NoSuchUpload":
        return Cause(
            "Refused",
            f": the multipart upload was removed while it ran ({answer.in_short})",
            "Check the bucket's lifecycle rules: an unfinished upload must be kept for a day.",
        )
    if answer.status != 404:
        return None
    own = asked.field == "storage.bucket"
    return Cause(
        "Missing",
        f": there is no such object ({answer.in_short})",
        "It may have been deleted." if own else f"Check {asked.field}.",
    )


def _spoiled(answer: Answer, asked: Asked) -> Cause | None:
    if answer.code not in SPOILED:
        return None
    return Cause(
        "Refused",
        ": the body came to the store changed or cut",
        "Check proxies between here and the store, and this machine's memory and network.",
        again=True,
    )


def _temporary(answer: Answer) -> bool:
    status = answer.status
    if status < 300 and answer.code:  # an error behind a status that was sent too early
        return True
    lasting = (501, 505, LOGIN_STATUS)
    return (status >= 500 and status not in lasting) or status in (408, 425, 429) or answer.code in AGAIN


def _later(answer: Answer, asked: Asked) -> Cause | None:
    if not _temporary(answer):
        return None
    if answer.status == 429 or answer.code in SLOWER:
        remedy = "The store asks for fewer requests: raise its limits, or lower dataset.workers."
    else:
        remedy = "Check that storage.endpoint is right and that the store is up and can be reached from here."
    return Cause("Unreachable", "", remedy, again=True)


def _condition(answer: Answer, asked: Asked) -> Cause | None:
    if not asked.condition or answer.status not in (400, 405, 501):
        return None
    return Cause(
        "Refused",
        f"was refused ({answer.in_short})",
        f"The store may lack conditional PUT ({asked.condition}), without which two writers could undo each "
        "other's work. Use a store that has it.",
    )


def _other(answer: Answer, asked: Asked) -> Cause:
    return Cause(
        "Refused",
        f"was refused ({answer.in_short})",
        "The store may lack what we use: plain and multipart PUT, ranged GET, HEAD, LIST, DELETE, "
        "If-None-Match on PUT; storage.addressingStyle may be wrong for it.",
    )


RULES: tuple[Callable[[Answer, Asked], Cause | None], ...] = (
    _tls,
    _redirect,
    _region,
    _token,
    _clock,
    _archived,
    _full,
    _bucket,
    _proxy_login,
    _too_large,
    _foreign,
    _denied,
    _missing,
    _spoiled,
    _later,
    _condition,
    _other,
)
"""In the order in which they are tried: codes before statuses, since a code says more."""
