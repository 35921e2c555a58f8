"""The canary: text that is in no training data, cut into windows of token ids, with the bytes that the
counted tokens stand for.

Everything is encoded as ordinary text, special tokens included, and no special token is put before it. A
window has at most training.sequenceLength tokens. The first window of a text counts all its tokens but the
first, which nothing predicts. Each next window begins half a window later and counts the tokens that no
earlier window has counted. So every token is counted once, given all tokens of its text before it or at least
half a window of them.

The texts are the run's own, in a bucket, or those that come with the package, in canary.json: prompts as
people write them and plain text, in several languages, in our own words and under the package's licence.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from vpmoe.data import vocabulary_file
from vpmoe.data.tokenizer import Ids, tokenizer
from vpmoe.failure import Permanent
from vpmoe.storage import Bucket, paths


@dataclass(frozen=True)
class CanaryText:
    """One text of the canary."""

    sha256: str
    ids_T: Ids
    size: int
    """Bytes of the counted tokens: all but the first."""


@dataclass(frozen=True)
class CanaryWindow:
    """Tokens [start, stop) of a text; those from `first` on are counted."""

    start: int
    first: int
    stop: int


def split_windows(tokens: int, max_length: int) -> list[CanaryWindow]:
    """The windows of a text of `tokens` tokens. None is longer than `max_length`, which must be 2 or more."""
    found, counted = [], 1
    for start in range(0, tokens, max_length - max_length // 2):
        stop = min(start + max_length, tokens)
        if counted < stop:
            found.append(CanaryWindow(start, counted, stop))
            counted = stop
    return found


def load_texts(url: str | None, bucket: Bucket) -> list[CanaryText]:
    """The texts of evaluation.canary, or those of the package if it names none. Raises as `read_texts`."""
    return packaged_texts() if url is None else read_texts(url, bucket)


def packaged_texts() -> list[CanaryText]:
    """The texts that come with the package: the prompts, then the plain texts, by language."""
    found = json.loads((files("vpmoe.data") / "canary.json").read_text(encoding="utf-8"))
    return [
        _encode(text.encode())
        for kind in ("prompts", "texts")
        for of_language in found[kind].values()
        for text in of_language
    ]


def read_texts(url: str, bucket: Bucket) -> list[CanaryText]:
    """The texts at an address in the bucket's store: the object of that name and all objects in the folder of
    that name, by key.

    Raises Permanent if there is nothing to measure or an object is not UTF-8 text; StorageError.
    """
    name, key = paths.split_url(url)
    store, key = bucket.other(name, "evaluation.canary"), key.removesuffix("/")
    found = [
        _read_text(store, entry.key)
        for entry in store.list(key)
        if entry.key == key or entry.key.startswith(f"{key}/")
    ]
    if not sum(text.size for text in found):
        raise Permanent(
            f"evaluation.canary: there is no text at {url}. Put UTF-8 text there, an object or a folder of "
            "objects, or remove the field."
        )
    return found


def texts_digest(found: Sequence[CanaryText]) -> str:
    """sha256 (hex) of the texts, independent of their names."""
    return hashlib.sha256("".join(text.sha256 for text in found).encode()).hexdigest()


def _read_text(bucket: Bucket, key: str) -> CanaryText:
    try:
        return _encode(bucket.get(key))
    except ValueError as error:
        raise Permanent(
            f"evaluation.canary: {bucket.url(key)} cannot be encoded as text ({error}). Give UTF-8 text."
        ) from error


def _encode(data: bytes) -> CanaryText:
    """Raises ValueError if it is not UTF-8, or no tokenizer can encode it."""
    ids_T = tokenizer().encode(data.decode())
    first = len(vocabulary_file.encoding().decode_single_token_bytes(int(ids_T[0]))) if len(ids_T) else 0
    return CanaryText(hashlib.sha256(data).hexdigest(), ids_T, len(data) - first)
