"""A Hugging Face model directory in a bucket or on the hub: its files, pinned to their content, and their
download.

No torch. cache.py keeps the files on a disk.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vpmoe.failure import Permanent
from vpmoe.pretrained import cache
from vpmoe.storage import BLOCK, Bucket, Object, paths
from vpmoe.storage.blocks import block_range, in_order
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.records import load_record

LONGEST_NAME = 240
"""Bytes of the longest file name. File systems hold 255; a file has a longer name while it is downloaded."""


@dataclass(frozen=True)
class ModelFile:
    """A file of the model: name in the directory, size in bytes, and ETag in the store or content id on the
    hub."""

    name: str
    size: int
    etag: str


@dataclass(frozen=True)
class ModelRef:
    """A model with every file pinned to its content.

    `commit`: of a Hugging Face model; None for one in a bucket.
    """

    model: str
    commit: str | None
    files: tuple[ModelFile, ...]

    @property
    def sha256(self) -> str:
        """Hash (hex) of the model's content, independent of its address: its commit, or (name, size, ETag) of
        its files."""
        content = self.commit or [[file.name, file.size, file.etag] for file in self.files]
        # Part of the ids of scores: it stays "teacher", for every model.
        return hashlib.sha256(json_bytes({"teacher": content})).hexdigest()

    def as_json(self) -> dict[str, Any]:
        return {"model": self.model, "commit": self.commit, "files": [asdict(file) for file in self.files]}


def resolve_model(field: str, model: str, bucket: Bucket, key: str, config: str) -> ModelRef:
    """The files of a model that a run was resolved to. The first job lists them and writes the result to
    `key`; later ones read that. `config`: hash of the run's configuration.

    Raises as find_model does.
    """
    if not bucket.exists(key):
        found = find_model(field, model, bucket)
        # The first of two concurrent jobs wins.
        bucket.create(key, json_bytes(found.as_json()), {"config": config})
    return load_record(bucket, key, ModelRef)


def find_model(field: str, model: str, bucket: Bucket) -> ModelRef:
    """The current files of a model. `field`: the field of the specification that names it, for errors.
    `bucket`: any bucket of the store that holds s3:// models.

    Subdirectories are ignored: `original` and `metal` of GPT-OSS hold its weights again in other formats.

    Raises Permanent if there is no model directory, Retriable if the hub does not answer, StorageError if the
    store fails.
    """
    commit = None
    if model.startswith("hf://"):
        from vpmoe.pretrained import hub  # here, because importing the hub's client takes seconds

        commit, listed = hub.commit_and_files(field, model)
        found = [ModelFile(*file) for file in listed]
    else:
        name, key = paths.split_url(model)
        folder = key.removesuffix("/") + "/"
        store = bucket.other(name, field)
        found = [
            ModelFile(seen.key.removeprefix(folder), seen.size, store.pin(seen).etag)
            for seen in store.list(folder)
        ]
    files = tuple(
        sorted((file for file in found if file.name and "/" not in file.name), key=lambda file: file.name)
    )
    if not any(file.name == "config.json" for file in files):
        raise Permanent(
            f"{field}: {model} has no config.json. Name a Hugging Face model directory, as "
            "save_pretrained writes it: config.json and *.safetensors."
        )
    if not any(file.name.endswith(".safetensors") for file in files):
        raise Permanent(
            f"{field}: {model} has no *.safetensors file beside its config.json. Copy the whole model "
            "directory; only safetensors are read."
        )
    for file in files:
        if file.name in (".", "..") or "\0" in file.name or len(file.name.encode()) > LONGEST_NAME:
            raise Permanent(
                f"{field}: {model}: no file of a disk can be called {file.name!r:.300}. Remove it from "
                "the model directory, or give it another name."
            )
    return ModelRef(model, commit, files)


def fetch_model(
    purpose: cache.Purpose,
    model: ModelRef,
    bucket: Bucket,
    folder: Path,
    check_stop: Callable[[], None] = lambda: None,
) -> Path:
    """A directory below `folder` with the model's files. Those that are not there, or are not what was
    downloaded, are downloaded (cache.py).

    `check_stop` is called before every block and may raise. Raises StorageError (Altered) if a file is no
    longer the pinned one, and (Local) if the disk is full; Permanent if it cannot be written.
    """

    def from_hub(names: list[str], directory: Path) -> Iterator[tuple[str, cache.Blocks]]:
        from vpmoe.pretrained import hub

        hub.download(purpose.field, model.model, str(model.commit), names, directory)
        for name in names:
            yield name, cache.hash_synced(directory / name)

    def from_bucket(names: list[str], directory: Path) -> Iterator[tuple[str, cache.Blocks]]:
        name, key = paths.split_url(model.model)
        store = bucket.other(name, purpose.field)
        for file in (file for file in model.files if file.name in names):
            pinned = Object(f"{key.removesuffix('/')}/{file.name}", file.size, file.etag)

            def block(index: int, pinned: Object = pinned) -> tuple[bytes, str]:
                check_stop()
                data = store.fetch_range(pinned, *block_range(pinned.size, index))
                return data, hashlib.sha256(data).hexdigest()

            blocks = in_order(block, range(-(-file.size // BLOCK)), cache.THREADS)
            path, source = directory / file.name, store.url(pinned.key)
            yield file.name, cache.write_blocks(path, file.size, source, blocks, purpose.if_full)

    sizes = {file.name: file.size for file in model.files}
    download = from_hub if model.commit else from_bucket
    return cache.complete(purpose, folder, folder_name(model, bucket), sizes, download, check_stop)


def folder_name(model: ModelRef, bucket: Bucket) -> str:
    """Name of the model's folder: the model's name, and a hash of where it comes from and of its content.

    Stores need not derive ETags from content, so equal ones of two sources prove nothing.
    """
    source = model.model.partition("@")[0].rstrip("/")
    if not model.commit:
        source = f"{bucket.endpoint} {source}"
    key = hashlib.sha256(json_bytes({"source": source, "teacher": model.sha256})).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", source.rpartition("/")[2])[:64]
    return f"{name}-{key}".lstrip(".")
