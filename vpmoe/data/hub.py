"""Lists the parquet files of a Hugging Face dataset at a revision and resolves the revision to a commit.
Needs the network.

Environment: HF_TOKEN for gated datasets, HF_ENDPOINT for mirrors.
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
"""Timeout of one request, in seconds."""


class HubFile(NamedTuple):
    """One file of a dataset on the hub."""

    url: str
    """hf://datasets/owner/name@commit/path"""
    size: int
    """Bytes."""
    content_id: str
    """The hub's id of its content."""


@contextmanager
def hub_errors(field: str, kind: str, alternative: str) -> Iterator[None]:
    """Translate the hub's errors: Permanent if it has no such repository or revision for us, Retriable if it
    does not answer.

    The messages begin with `field`, a field and its value. `alternative` says what to do without the hub.
    """
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError, HFValidationError) as error:
        raise Permanent(
            f"{field}: the Hugging Face hub has no such {kind} or revision, or we have no access to it "
            f"({type(error).__name__}). Check the name; a gated {kind} needs HF_TOKEN."
        ) from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise Retriable(
            f"{field}: the Hugging Face hub does not answer ({type(error).__name__}: {error}). Give this "
            f"machine access to huggingface.co (HF_ENDPOINT names a mirror), or {alternative}."
        ) from error


def list_parquet_files(source: str) -> tuple[str, list[HubFile]]:
    """The commit of hf://owner/name@revision (no revision: the default branch) and the parquet files of that
    commit.

    Raises Permanent if the hub has no such dataset or revision, Retriable if it does not answer.
    """
    repository, _, revision = source.removeprefix("hf://").partition("@")
    with hub_errors(
        f"dataset.source: {source}",
        "dataset",
        "copy the parquet files to a bucket and name them as s3://bucket/path/*.parquet",
    ):
        found = HfApi().dataset_info(
            repository, revision=revision or None, files_metadata=True, timeout=TIMEOUT
        )
    if found.sha is None:
        raise Retriable(f"dataset.source: {source}: the answer of the Hugging Face hub has no commit.")
    root = f"hf://datasets/{repository}@{found.sha}"
    files = [file for file in found.siblings or [] if file.rfilename.endswith(".parquet")]
    return found.sha, [
        HubFile(f"{root}/{file.rfilename}", file.size or 0, file.blob_id or "") for file in files
    ]
