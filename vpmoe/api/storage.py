"""spec.storage: the S3 bucket of the run and how to reach it."""

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
    """The S3 bucket that jobs share and that everything is kept in: data sets, scores, checkpoints, reports."""

    endpoint: Annotated[str, ENDPOINT] | None = None
    """Address of the S3 service, such as https://s3.example.com; null means AWS in the region below."""
    bucket: Annotated[str, BUCKET]
    """The bucket. It must exist, and its service must honour conditional PUTs; a run proves both before it does anything."""
    prefix: Annotated[str, PREFIX] = ""
    """Path inside the bucket below which everything is kept; empty means its root. Runs share data sets only below one prefix."""
    credentials_secret: Annotated[str, SECRET] | None = None
    """Secret of the run's namespace with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; null or absent uses the service account's
    own identity."""
    region: Annotated[str, Field(min_length=1, max_length=64)] = "us-east-1"
    """Region that requests are signed for. Services other than AWS mostly ignore it."""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """Whether the bucket stands in the path or in the host name of a request. auto chooses by endpoint; path suits most services other
    than AWS."""
    ca_secret: Annotated[str, SECRET] | None = None
    """Secret of the run's namespace whose key ca.crt holds the certificates to trust for the endpoint; null trusts the image's own."""
