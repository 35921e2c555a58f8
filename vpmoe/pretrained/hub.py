"""A model on the Hugging Face hub: resolve a revision to a commit and its files, and download them.

`field` is the field of the specification that names the model, for errors.
"""

import glob
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from vpmoe.data.hub import TIMEOUT, hub_errors
from vpmoe.failure import Retriable

INSTEAD = "copy the model directory to a bucket and name it as s3://bucket/path"


def commit_and_files(field: str, model: str) -> tuple[str, list[tuple[str, int, str]]]:
    """The commit of hf://owner/name@revision (without a revision: the newest), and each file's (name, size,
    content id).

    Raises Permanent if the hub has no such model or revision, Retriable if it does not answer.
    """
    repository, _, revision = model.removeprefix("hf://").partition("@")
    with hub_errors(f"{field}: {model}", "model", INSTEAD):
        found = HfApi().model_info(
            repository, revision=revision or None, files_metadata=True, timeout=TIMEOUT
        )
    if found.sha is None:
        raise Retriable(f"{field}: {model}: the Hugging Face hub returned no commit.")
    return found.sha, [(file.rfilename, file.size or 0, file.blob_id or "") for file in found.siblings or []]


def download(field: str, model: str, commit: str, names: list[str], folder: Path) -> None:
    """Download these files of a commit into `folder`; existing files are kept. What a killed process has left
    of a file is not continued: it may never have reached the disk.

    Raises as commit_and_files does; OSError if the disk is full or cannot be written.
    """
    repository = model.removeprefix("hf://").partition("@")[0]
    for part in folder.glob(".cache/huggingface/download/*.incomplete"):
        part.unlink(missing_ok=True)
    with hub_errors(f"{field}: {model}", "model", INSTEAD):
        exact = [glob.escape(name) for name in names]
        snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=exact)
