"""The teacher's model: its files, pinned once per run, and whether its vocabulary is the datasets'.

No torch: the trainer imports this too. vpmoe.inference.teacher_engine runs the model.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vpmoe.api import DistillRun
from vpmoe.checkpoint.safetensors_header import InvalidCheckpoint, read_folder, read_json_object
from vpmoe.data.vocabulary import TEXT_IDS, VOCABULARY_SHA256, VOCABULARY_SIZE
from vpmoe.failure import Permanent
from vpmoe.pretrained.model_files import ModelRef, fetch_model, find_model, resolve_model
from vpmoe.storage import Bucket, paths
from vpmoe.teacher.folder import FIELD, teacher_in

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Floating-point types: their name in a safetensors header, and in torch."""


def resolve_teacher(run: DistillRun, bucket: Bucket) -> ModelRef:
    """The run's teacher, as resolve_model finds it."""
    return resolve_model(FIELD, run.spec.teacher.model, bucket, paths.teacher(run), run.config_hash)


def find_teacher(model: str, bucket: Bucket) -> ModelRef:
    """The current files of `teacher.model`. `bucket`: any bucket of the store that holds s3:// models."""
    return find_model(FIELD, model, bucket)


def fetch_teacher(
    teacher: ModelRef, bucket: Bucket, folder: Path, check_stop: Callable[[], None] = lambda: None
) -> Path:
    """A directory below `folder` with the teacher's files, as fetch_model makes it."""
    return fetch_model(teacher_in(folder), teacher, bucket, folder, check_stop)


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
