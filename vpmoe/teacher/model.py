"""The teacher's model: which files it is, pinned once a run; bringing them to disk; and whether it speaks the students' vocabulary.

No torch here: the trainer asks too. What is asked of the model once it runs is scorer.py's business.
"""

import base64
import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vpmoe.api import DistillRun
from vpmoe.data.vocabulary import TEXT_IDS, VOCABULARY_SHA256, VOCABULARY_SIZE
from vpmoe.failure import Permanent
from vpmoe.storage import BLOCK, Bucket, Object, paths
from vpmoe.storage.blocks import block_range, in_order
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.local import written_whole

THREADS = 8
"""Blocks of a file in flight while it is fetched."""

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Names of floating-point types in a safetensors header, and torch's."""


@dataclass(frozen=True)
class TeacherFile:
    """A file of the model: its name in the directory, bytes, and ETag in the store, or the content's id on the hub."""

    name: str
    size: int
    etag: str


@dataclass(frozen=True)
class TeacherRef:
    """A model, each of its files pinned to the content that was found; `commit` is a Hugging Face model's, None in a bucket."""

    model: str
    commit: str | None
    files: tuple[TeacherFile, ...]

    @property
    def sha256(self) -> str:
        """Hash (hex) of what the model is, wherever it lies: its commit, or the sorted (name, size, ETag) of its files."""
        content = self.commit or [[file.name, file.size, file.etag] for file in self.files]
        return hashlib.sha256(json_bytes({"teacher": content})).hexdigest()

    def as_json(self) -> dict[str, Any]:
        return {"model": self.model, "commit": self.commit, "files": [asdict(file) for file in self.files]}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "TeacherRef":
        return cls(found["model"], found["commit"], tuple(TeacherFile(**file) for file in found["files"]))


def resolve_teacher(run: DistillRun, bucket: Bucket) -> TeacherRef:
    """The run's teacher. The first job to ask lists its files and writes what it found into the run; later ones read that.

    Raises Permanent where there is no model directory, Retriable where the hub does not answer, StorageError where the store fails.
    """
    key = paths.teacher(run)
    if not bucket.exists(key):
        found = find_teacher(run.spec.teacher.model, bucket)
        bucket.create(
            key, json_bytes(found.as_json()), {"config": run.config_hash}
        )  # of two jobs the first one's answer holds
    return TeacherRef.from_json(bucket.get_json(key))


def find_teacher(model: str, bucket: Bucket) -> TeacherRef:
    """The files that `teacher.model` stands for now. `bucket` is any bucket of the store that s3:// models lie in.

    Only files of the directory itself: GPT-OSS' folders `original` and `metal` hold its weights again, in other forms.
    """
    commit = None
    if model.startswith("hf://"):
        from vpmoe.teacher import hub  # here, because importing the hub's client takes seconds

        commit, listed = hub.commit_and_files(model)
        found = [TeacherFile(*file) for file in listed]
    else:
        name, key = paths.split_url(model)
        folder = key.rstrip("/") + "/"
        found = [
            TeacherFile(seen.key.removeprefix(folder), seen.size, seen.etag)
            for seen in bucket.other(name).list(folder)
        ]
    files = tuple(
        sorted((file for file in found if file.name and "/" not in file.name), key=lambda file: file.name)
    )
    if not any(file.name == "config.json" for file in files):
        raise Permanent(
            f"teacher.model: {model} has no config.json. Name a Hugging Face model directory, as save_pretrained writes it: "
            "config.json and *.safetensors."
        )
    return TeacherRef(model, commit, files)


def fetch_teacher(
    teacher: TeacherRef, bucket: Bucket, folder: Path, check_stop: Callable[[], None] = lambda: None
) -> Path:
    """Bring the model to disk, into a directory of its own below `folder`, and return that. What is there already stays.

    `check_stop` is called before every block and may raise. Raises StorageError (Altered) where a file is no longer the one that
    was found, and (Local) where the disk is full.
    """
    directory = folder / teacher.sha256[:16]
    directory.mkdir(parents=True, exist_ok=True)
    if teacher.commit:
        from vpmoe.teacher import hub

        hub.download(teacher.model, teacher.commit, [file.name for file in teacher.files], directory)
        return directory
    name, key = paths.split_url(teacher.model)
    store = bucket.other(name)
    for file in teacher.files:
        path = directory / file.name
        if path.is_file():  # it appeared whole, and the directory is this content's own
            continue
        pinned = Object(f"{key.rstrip('/')}/{file.name}", file.size, file.etag)

        def block(index: int, pinned: Object = pinned) -> bytes:
            check_stop()
            return store.fetch_range(pinned, *block_range(pinned.size, index))

        with written_whole(path, file.size, store.url(pinned.key)) as written:
            for data in in_order(block, range(-(-file.size // BLOCK)), THREADS):
                written.write(data)
    return directory


def check_vocabulary(directory: Path) -> None:
    """Raise Permanent where the model has another vocabulary than the data sets. A directory without tokenizer files is fine."""
    size = read_config(directory).get("vocab_size")
    if size != VOCABULARY_SIZE:
        raise Permanent(
            f"teacher.model: config.json says vocab_size {size}, the data sets' ids go up to {VOCABULARY_SIZE:,}. Give a model of the "
            "o200k_harmony vocabulary, such as GPT-OSS."
        )
    for path in sorted([*directory.glob("tokenizer.json"), *directory.glob("*.tiktoken")]):
        found = hashlib.sha256(
            path.read_bytes() if path.suffix == ".tiktoken" else tiktoken_file(path)
        ).hexdigest()
        if found != VOCABULARY_SHA256:
            raise Permanent(
                f"teacher.model: {path.name}: its tokens are another vocabulary (sha256 {found}) than the data sets' o200k "
                f"({VOCABULARY_SHA256}), so the same ids would mean another text. Give a model with GPT-OSS' tokenizer."
            )


def tiktoken_file(tokenizer: Path) -> bytes:
    """The .tiktoken file of the merges in a tokenizer.json: a line a token, its bytes in base64 and its rank. Empty where it has none."""
    try:
        vocabulary: Mapping[str, int] = json.loads(tokenizer.read_bytes())["model"]["vocab"]
        ranks = sorted((rank, token) for token, rank in vocabulary.items() if rank < TEXT_IDS)
        byte = byte_of_character()
        return b"".join(
            b"%s %d\n" % (base64.b64encode(bytes(byte[c] for c in token)), rank) for rank, token in ranks
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return b""


def byte_of_character() -> dict[str, int]:
    """How byte-level BPE writes each byte as a character (GPT-2's bytes_to_unicode): printable ones as Latin-1, others from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def read_config(directory: Path) -> dict[str, Any]:
    """The model's config.json. Raises Permanent where it is not JSON."""
    try:
        found: dict[str, Any] = json.loads((directory / "config.json").read_bytes())
    except ValueError as error:
        raise Permanent(
            f"teacher.model: config.json is not JSON ({error}). Write the model's directory again."
        ) from error
    return found


def checkpoint_dtype(directory: Path) -> str:
    """The floating-point type, in torch's words, that the checkpoint declares: in config.json, else by its output projection.

    Raises Permanent where neither says one.
    """
    said = read_config(directory)
    declared = said.get("dtype") or said.get("torch_dtype")
    if declared:
        return str(declared).removeprefix("torch.")
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            if header.get(name, {}).get("dtype") in DTYPES:
                return DTYPES[header[name]["dtype"]]
    raise Permanent(
        "teacher.model: config.json names no dtype, and no *.safetensors file has an lm_head.weight. Add dtype to config.json."
    )
