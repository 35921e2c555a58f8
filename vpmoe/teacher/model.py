"""The teacher's model: its files, pinned once per run; their download; and whether its vocabulary is the
datasets'.

No torch: the trainer imports this too. vpmoe.inference.teacher_engine runs the model.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vpmoe.api import DistillRun
from vpmoe.checkpoint.safetensors_header import InvalidCheckpoint, read_folder, read_json_object
from vpmoe.data.vocabulary import TEXT_IDS, VOCABULARY_SHA256, VOCABULARY_SIZE
from vpmoe.failure import Permanent
from vpmoe.storage import BLOCK, Bucket, Object, paths
from vpmoe.storage.blocks import block_range, in_order
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.records import load_record
from vpmoe.teacher import cache

LONGEST_NAME = 240
"""Bytes of the longest file name. File systems hold 255; a file has a longer name while it is downloaded."""

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Floating-point types: their name in a safetensors header, and in torch."""


@dataclass(frozen=True)
class TeacherFile:
    """A file of the model: name in the directory, size in bytes, and ETag in the store or content id on the
    hub."""

    name: str
    size: int
    etag: str


@dataclass(frozen=True)
class TeacherRef:
    """A model with every file pinned to its content.

    `commit`: of a Hugging Face model; None for one in a bucket.
    """

    model: str
    commit: str | None
    files: tuple[TeacherFile, ...]

    @property
    def sha256(self) -> str:
        """Hash (hex) of the model's content, independent of its address: its commit, or (name, size, ETag) of
        its files."""
        content = self.commit or [[file.name, file.size, file.etag] for file in self.files]
        return hashlib.sha256(json_bytes({"teacher": content})).hexdigest()

    def as_json(self) -> dict[str, Any]:
        return {"model": self.model, "commit": self.commit, "files": [asdict(file) for file in self.files]}


def resolve_teacher(run: DistillRun, bucket: Bucket) -> TeacherRef:
    """The run's teacher.

    The first job lists its files and writes the result into the run; later ones read that.

    Raises Permanent if there is no model directory, Retriable if the hub does not answer, StorageError if the
    store fails.
    """
    key = paths.teacher(run)
    if not bucket.exists(key):
        found = find_teacher(run.spec.teacher.model, bucket)
        # The first of two concurrent jobs wins.
        bucket.create(key, json_bytes(found.as_json()), {"config": run.config_hash})
    return load_record(bucket, key, TeacherRef)


def find_teacher(model: str, bucket: Bucket) -> TeacherRef:
    """The current files of `teacher.model`. `bucket`: any bucket of the store that holds s3:// models.

    Subdirectories are ignored: `original` and `metal` of GPT-OSS hold its weights again in other formats.
    """
    commit = None
    if model.startswith("hf://"):
        from vpmoe.teacher import hub  # here, because importing the hub's client takes seconds

        commit, listed = hub.commit_and_files(model)
        found = [TeacherFile(*file) for file in listed]
    else:
        name, key = paths.split_url(model)
        folder = key.removesuffix("/") + "/"
        store = bucket.other(name, "teacher.model")
        found = [
            TeacherFile(seen.key.removeprefix(folder), seen.size, store.pin(seen).etag)
            for seen in store.list(folder)
        ]
    files = tuple(
        sorted((file for file in found if file.name and "/" not in file.name), key=lambda file: file.name)
    )
    if not any(file.name == "config.json" for file in files):
        raise Permanent(
            f"teacher.model: {model} has no config.json. Name a Hugging Face model directory, as "
            "save_pretrained writes it: config.json and *.safetensors."
        )
    if not any(file.name.endswith(".safetensors") for file in files):
        raise Permanent(
            f"teacher.model: {model} has no *.safetensors file beside its config.json. Copy the whole model "
            "directory; only safetensors are read."
        )
    for file in files:
        if file.name in (".", "..") or "\0" in file.name or len(file.name.encode()) > LONGEST_NAME:
            raise Permanent(
                f"teacher.model: {model}: no file of a disk can be called {file.name!r:.300}. Remove it from "
                "the model directory, or give it another name."
            )
    return TeacherRef(model, commit, files)


def fetch_teacher(
    teacher: TeacherRef, bucket: Bucket, folder: Path, check_stop: Callable[[], None] = lambda: None
) -> Path:
    """A directory below `folder` with the model's files. Those that are not there, or are not what was
    downloaded, are downloaded (vpmoe.teacher.cache).

    `check_stop` is called before every block and may raise. Raises StorageError (Altered) if a file is no
    longer the pinned one, and (Local) if the disk is full; Permanent if it cannot be written.
    """

    def from_hub(names: list[str], directory: Path) -> Iterator[tuple[str, cache.Blocks]]:
        from vpmoe.teacher import hub

        hub.download(teacher.model, str(teacher.commit), names, directory)
        for name in names:
            yield name, cache.hash_synced(directory / name)

    def from_bucket(names: list[str], directory: Path) -> Iterator[tuple[str, cache.Blocks]]:
        name, key = paths.split_url(teacher.model)
        store = bucket.other(name, "teacher.model")
        for file in (file for file in teacher.files if file.name in names):
            pinned = Object(f"{key.removesuffix('/')}/{file.name}", file.size, file.etag)

            def block(index: int, pinned: Object = pinned) -> tuple[bytes, str]:
                check_stop()
                data = store.fetch_range(pinned, *block_range(pinned.size, index))
                return data, hashlib.sha256(data).hexdigest()

            blocks = in_order(block, range(-(-file.size // BLOCK)), cache.THREADS)
            yield (
                file.name,
                cache.write_blocks(directory / file.name, file.size, store.url(pinned.key), blocks),
            )

    sizes = {file.name: file.size for file in teacher.files}
    download = from_hub if teacher.commit else from_bucket
    return cache.complete(folder, folder_name(teacher, bucket), sizes, download, check_stop)


def folder_name(teacher: TeacherRef, bucket: Bucket) -> str:
    """Name of the teacher's folder: its model's name, and a hash of where it comes from and of its content.

    Stores need not derive ETags from content, so equal ones of two sources prove nothing.
    """
    source = teacher.model.partition("@")[0].rstrip("/")
    if not teacher.commit:
        source = f"{bucket.endpoint} {source}"
    key = hashlib.sha256(json_bytes({"source": source, "teacher": teacher.sha256})).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", source.rpartition("/")[2])[:64]
    return f"{name}-{key}".lstrip(".")


def check_vocabulary(directory: Path) -> None:
    """Raise Permanent if the model's vocabulary is not the datasets'.

    A directory without tokenizer files passes.
    """
    size = read_config(directory).get("vocab_size")
    if size != VOCABULARY_SIZE:
        raise Permanent(
            f"teacher.model: config.json says vocab_size {size}, the datasets' ids go up to "
            f"{VOCABULARY_SIZE:,}. Give a model of the o200k_harmony vocabulary, such as GPT-OSS."
        )
    for path in sorted([*directory.glob("tokenizer.json"), *directory.glob("*.tiktoken")]):
        found = hashlib.sha256(
            path.read_bytes() if path.suffix == ".tiktoken" else tiktoken_file(path)
        ).hexdigest()
        if found != VOCABULARY_SHA256:
            raise Permanent(
                f"teacher.model: {path.name}: its tokens are another vocabulary (sha256 {found}) than the "
                f"datasets' o200k ({VOCABULARY_SHA256}), so the same ids would mean another text. Give a "
                "model with GPT-OSS' tokenizer."
            )


def tiktoken_file(tokenizer: Path) -> bytes:
    """The .tiktoken file of a tokenizer.json: per token a line with its bytes in base64 and its rank. Empty
    if malformed."""
    try:
        vocabulary: Mapping[str, int] = json.loads(tokenizer.read_bytes())["model"]["vocab"]
        ranks = sorted((rank, token) for token, rank in vocabulary.items() if rank < TEXT_IDS)
        byte = byte_of_character()
        return b"".join(
            b"%s %d\n" % (base64.b64encode(bytes(byte[c] for c in token)), rank) for rank, token in ranks
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return b""


def byte_of_character() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for, as in GPT-2's bytes_to_unicode.

    Printable bytes are their Latin-1 characters, the others characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def read_config(directory: Path) -> dict[str, Any]:
    """The model's config.json. Raises Permanent if there is none, or if it is not a JSON object."""
    try:
        return read_json_object(directory / "config.json")
    except InvalidCheckpoint as error:
        raise Permanent(f"teacher.model: {error} Write the model's directory again.") from error


def declared_dtype(config: Mapping[str, Any]) -> str | None:
    """torch's name of the dtype that config.json declares; None if it declares none.

    Raises Permanent if no engine computes in it.
    """
    declared = config.get("dtype") or config.get("torch_dtype")
    if not declared:
        return None
    name = str(declared).removeprefix("torch.")
    if name not in DTYPES.values():
        raise Permanent(
            f"teacher.model: config.json declares dtype {declared!r:.80}, not one of "
            f"{', '.join(DTYPES.values())}. Declare the type in which the weights were saved."
        )
    return name


def checkpoint_dtype(directory: Path) -> str:
    """torch's name of the checkpoint's dtype: as declared in config.json, otherwise that of its output
    projection.

    Raises Permanent if neither is there, InvalidCheckpoint as read_folder does.
    """
    if declared := declared_dtype(read_config(directory)):
        return declared
    stored = read_folder(directory)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        if name in stored and stored[name].dtype in DTYPES:
            return DTYPES[stored[name].dtype]
    raise Permanent(
        "teacher.model: config.json names no dtype, and no *.safetensors file has an lm_head.weight. Add "
        "dtype to config.json."
    )
