"""The teacher's model: its files, pinned once per run; their download; and whether its vocabulary is the
datasets'.

No torch: the trainer imports this too. vpmoe.inference.teacher_engine runs the model.
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
"""Blocks of a file that are downloaded at the same time."""

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

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "TeacherRef":
        return cls(found["model"], found["commit"], tuple(TeacherFile(**file) for file in found["files"]))


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
    return TeacherRef.from_json(bucket.get_json(key))


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
            f"teacher.model: {model} has no config.json. Name a Hugging Face model directory, as "
            "save_pretrained writes it: config.json and *.safetensors."
        )
    return TeacherRef(model, commit, files)


def fetch_teacher(
    teacher: TeacherRef, bucket: Bucket, folder: Path, check_stop: Callable[[], None] = lambda: None
) -> Path:
    """Download the model into a directory of its own below `folder` and return that. Existing files are kept.

    `check_stop` is called before every block and may raise. Raises StorageError (Altered) if a file is no
    longer the pinned one, and (Local) if the disk is full.
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
        if path.is_file():  # files appear whole, and the directory belongs to this content
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
    except (ValueError, KeyError, TypeError, AttributeError):
        return b""


def byte_of_character() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for, as in GPT-2's bytes_to_unicode.

    Printable bytes are their Latin-1 characters, the others characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def read_config(directory: Path) -> dict[str, Any]:
    """The model's config.json. Raises Permanent if it is not JSON."""
    try:
        found: dict[str, Any] = json.loads((directory / "config.json").read_bytes())
    except ValueError as error:
        raise Permanent(
            f"teacher.model: config.json is not JSON ({error}). Write the model's directory again."
        ) from error
    return found


def checkpoint_dtype(directory: Path) -> str:
    """torch's name of the checkpoint's dtype: as declared in config.json, otherwise that of its output
    projection.

    Raises Permanent if neither is there.
    """
    settings = read_config(directory)
    declared = settings.get("dtype") or settings.get("torch_dtype")
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
        "teacher.model: config.json names no dtype, and no *.safetensors file has an lm_head.weight. Add "
        "dtype to config.json."
    )
