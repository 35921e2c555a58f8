"""Which parquet files a Hugging Face data set holds at a revision, and the commit that the revision is now.

Needs the network; everything else about inputs is in inputs.py. Environment: HF_TOKEN for gated data sets, HF_ENDPOINT for mirrors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vpmoe.failure import Permanent, Retriable

TIMEOUT = 30.0
"""Seconds that one request may take."""


class HubFile(NamedTuple):
    """One file of a data set on the hub."""

    url: str
    """hf://datasets/owner/name@commit/path."""
    size: int
    """Bytes."""
    content_id: str
    """The hub's id of its content."""


@contextmanager
def asking(what: str, kind: str, instead: str) -> Iterator[None]:
    """Translate the hub's errors about `what`, a field and its value: Permanent where it has no such thing for us, Retriable where it
    does not answer. `instead` is the way out without the hub.
    """
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError, HFValidationError) as error:
        raise Permanent(
            f"{what}: the Hugging Face hub has no such {kind} or revision for us ({type(error).__name__}). Check the "
            f"name; a gated {kind} needs HF_TOKEN."
        ) from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise Retriable(
            f"{what}: the Hugging Face hub does not answer ({type(error).__name__}: {error}). Let this machine reach "
            f"huggingface.co (HF_ENDPOINT names a mirror), or {instead}."
        ) from error


def parquet_files(source: str) -> tuple[str, list[HubFile]]:
    """The commit that the revision of hf://owner/name@revision (none: the newest) is now, and that commit's parquet files.

    Raises Permanent where the hub knows no such data set or revision, Retriable where it does not answer.
    """
    repository, _, revision = source.removeprefix("hf://").partition("@")
    with asking(
        f"dataset.source: {source}",
        "data set",
        "copy the parquet files to a bucket and name them as s3://bucket/path/*.parquet",
    ):
        found = HfApi().dataset_info(
            repository, revision=revision or None, files_metadata=True, timeout=TIMEOUT
        )
    if found.sha is None:
        raise Retriable(f"dataset.source: {source}: the Hugging Face hub names no commit.")
    root = f"hf://datasets/{repository}@{found.sha}"
    files = [file for file in found.siblings or [] if file.rfilename.endswith(".parquet")]
    return found.sha, [
        HubFile(f"{root}/{file.rfilename}", file.size or 0, file.blob_id or "") for file in files
    ]
