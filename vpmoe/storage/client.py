"""The S3 client: boto3's, configured for any S3-compatible server. Retries are ours (retries.py)."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config

from vpmoe.storage.retries import Patience

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from vpmoe.api.storage import StorageSpec

CONNECTIONS = 16
"""Connections kept open: several uploads or downloads of four blocks each."""


@dataclass(frozen=True, repr=False)
class Credentials:
    """An explicit key pair, which the operator has from a run's Secret. It has no repr, so that no log shows
    it."""

    access_key: str
    secret_key: str


def connect(
    spec: "StorageSpec", credentials: Credentials | None, ca_bundle: Path | None, patience: Patience
) -> "S3Client":
    """A client of the store that `spec` names; see Bucket.open for where credentials and endpoint come from.
    Sends nothing."""
    session = boto3.session.Session(
        aws_access_key_id=credentials.access_key if credentials else None,
        aws_secret_access_key=credentials.secret_key if credentials else None,
    )
    config = Config(
        signature_version="s3v4",
        connect_timeout=patience.connect,
        read_timeout=patience.read,
        retries={"total_max_attempts": 1, "mode": "standard"},  # retries.py tries again, see there
        request_checksum_calculation="when_required",  # some stores refuse the trailers of the default
        response_checksum_validation="when_required",
        max_pool_connections=CONNECTIONS,
        ignore_configured_endpoint_urls=credentials is not None,  # type: ignore[call-arg]  # the stubs do not know it
        s3={
            "addressing_style": spec.addressing_style,
            "payload_signing_enabled": True,
        },  # the store proves each body as it comes in
    )
    return session.client(
        "s3",
        region_name=spec.region,
        config=config,
        verify=str(ca_bundle) if ca_bundle else None,
        endpoint_url=spec.endpoint if credentials else os.environ.get("AWS_ENDPOINT_URL") or spec.endpoint,
    )
