"""Lists and reads the parquet files of a Hugging Face dataset at the commit of a revision. Needs the network.

Environment: HF_TOKEN for gated datasets, HF_ENDPOINT for mirrors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not in __all__
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
)

from vpmoe.api.environment import IN_A_POD
from vpmoe.failure import EXHAUSTED, Permanent, Retriable
from vpmoe.storage.answers import printable

TIMEOUT = 30.0
"""Timeout of one request, in seconds."""

VARIABLES = (
    "HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, SSL_CERT_FILE"
)
"""Environment of the hub's client and of httpx below it."""
MISCONFIGURED = (
    OfflineModeIsEnabled,
    httpx2.UnsupportedProtocol,
    httpx2.InvalidURL,
    ValueError,
    ImportError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
"""What they raise if a variable is malformed, or names a file that cannot be read; ImportError for a SOCKS
proxy."""

INSTEAD = "copy the parquet files to a bucket and name them as s3://bucket/path/*.parquet"


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
            f"({type(error).__name__}). Check the name; a gated {kind} needs HF_TOKEN ({IN_A_POD})."
        ) from error
    except MISCONFIGURED as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise _away(field, error, alternative) from error
        raise Permanent(
            f"{field}: the Hugging Face hub cannot be asked ({_quoted(error)}). "
            f"Correct or unset what is wrong of {VARIABLES} ({IN_A_POD}), or {alternative}."
        ) from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        if getattr(error, "errno", None) in EXHAUSTED:
            raise  # this machine's disk or memory, which vpmoe.failure explains
        raise _away(field, error, alternative) from error


def _quoted(error: Exception) -> str:
    return f"{type(error).__name__}: {printable(str(error), 240)}"


def _away(field: str, error: Exception, alternative: str) -> Retriable:
    return Retriable(
        f"{field}: the Hugging Face hub does not answer ({_quoted(error)}). Give "
        f"this machine access to huggingface.co, or name a mirror in HF_ENDPOINT or a proxy in HTTPS_PROXY "
        f"({IN_A_POD}), or {alternative}."
    )


def list_parquet_files(source: str) -> tuple[str, list[HubFile]]:
    """The commit of hf://owner/name@revision (no revision: the default branch) and the parquet files of that
    commit.

    Raises Permanent if the hub has no such dataset or revision, Retriable if it does not answer.
    """
    repository, _, revision = source.removeprefix("hf://").partition("@")
    with hub_errors(
        f"dataset.source: {source}",
        "dataset",
        INSTEAD,
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


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a listed file, a HubFile's `url`.

    Raises Permanent if we have no access to the dataset any more, Retriable if the hub does not answer.
    """
    repository, _, rest = url.removeprefix("hf://datasets/").partition("@")
    commit, _, path = rest.partition("/")
    with hub_errors(f"dataset.source: {url}", "dataset", INSTEAD):
        answer = http_backoff(
            "GET",
            hf_hub_url(repository, path, repo_type="dataset", revision=commit),
            headers={**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"},
            timeout=TIMEOUT,
        )
        hf_raise_for_status(answer)
    if len(answer.content) != stop - start:
        raise Retriable(
            f"dataset.source: {url}: the Hugging Face hub sent {len(answer.content)} bytes, asked for bytes "
            f"[{start}, {stop}). Try again, or {INSTEAD}."
        )
    return answer.content
