"""spec.storage and spec.evaluation: the bucket that everything is kept in, and how progress is measured."""

from typing import Annotated, Literal

from pydantic import Field

from vpmoe.api.base import Matches, Model
from vpmoe.api.quantities import Tokens
from vpmoe.api.student import S3_FOLDER

ENDPOINT = Matches(r"https?://[^/?#\s]+/?", "must be https://host or http://host:port, without a path")
BUCKET = Matches(
    r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]",
    "must be a bucket name: 3 to 63 lowercase letters, digits, dots and hyphens",
    63,
)
PREFIX = Matches(
    r"|[^/\s][^\s]*[^/\s]|[^/\s]",
    "must be a path inside the bucket without a slash at either end, or empty",
    512,
)
SECRET = Matches(
    r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", "must be the name of a Secret in the run's namespace", 253
)


class Storage(Model):
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


class Evaluation(Model):
    """How progress is measured while a stage trains, and after it."""

    every_tokens: Tokens = 100_000_000
    """Tokens between evaluations of the held-out loss while a stage trains. Lower shows more and trains less."""
    documents: Annotated[int, Field(ge=0, le=1_000_000)] = 2048
    """Held-out documents scored each time, the same ones in every stage. More is steadier and slower; 0 measures no held-out loss."""
    completions: Annotated[int, Field(ge=0, le=1_000_000)] = 256
    """Completions sampled after each stage to measure Harmony validity and lengths, a third at each effort. More is steadier and slower:
    with 256 a share is known to about 0.03. 0 measures none."""
    canary: Annotated[str, S3_FOLDER] | None = None
    """Text that is never trained on, measured in bits per byte after each stage: s3://bucket/path of a UTF-8 text on the endpoint of
    spec.storage, or of a folder of such. null measures none."""
