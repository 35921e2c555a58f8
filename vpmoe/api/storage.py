"""spec.storage: the S3 bucket of the run and how to connect to it."""

from typing import Annotated, Literal

from pydantic import Field

from vpmoe.api.base import ApiModel, TextPattern

ENDPOINT = TextPattern(r"https?://[^/?#\s]+/?", "must be https://host or http://host:port, without a path")
BUCKET = TextPattern(
    r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]",
    "must be a bucket name: 3 to 63 lowercase letters, digits, dots and hyphens",
    63,
)
PREFIX = TextPattern(
    r"|[^/\s][^\s]*[^/\s]|[^/\s]",
    "must be a path inside the bucket without a slash at either end, or empty",
    512,
)
SECRET = TextPattern(
    r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", "must be the name of a Secret in the run's namespace", 253
)


class StorageSpec(ApiModel):
    """The S3 bucket that holds everything the run reads and writes: datasets, scores, checkpoints,
    metrics."""

    endpoint: Annotated[str, ENDPOINT] | None = None
    """URL of the S3 service, such as https://s3.example.com; null uses AWS in the given region."""
    bucket: Annotated[str, BUCKET]
    """Name of the bucket. It must exist and support conditional PUTs; a run verifies both before its first
    step."""
    prefix: Annotated[str, PREFIX] = ""
    """Path inside the bucket under which all objects are stored; empty means the root. Only runs with the
    same prefix share datasets."""
    credentials_secret: Annotated[str, SECRET] | None = None
    """Secret in the run's namespace with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY and, for
    temporary credentials, AWS_SESSION_TOKEN; null or absent uses the identity of the pods' service
    account."""
    region: Annotated[str, Field(min_length=1, max_length=64)] = "us-east-1"
    """Region that requests are signed for. Most services other than AWS ignore it."""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """Whether requests have the bucket's name in the path or in the host name (virtual). auto chooses by
    endpoint; most services other than AWS need path."""
    ca_secret: Annotated[str, SECRET] | None = None
    """Secret in the run's namespace whose key ca.crt holds the CA certificates of the endpoint; null uses
    those of the image."""
