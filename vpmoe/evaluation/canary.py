"""The canary: text that nobody trains on, as windows of token ids, and how many bytes the tokens that count stand for.

Text is encoded as ordinary text, specials in it too, and no special stands before it. A window has at most training.sequenceLength tokens;
the first counts all of its tokens but the text's first, which nothing predicts, and each next one begins half a window further on and
counts the tokens that no window before it has counted. So every token is counted once, given all tokens of its text before it or at least
half a window of them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from vpmoe.data import vocabulary_file
from vpmoe.data.tokenizer import Ids, tokenizer
from vpmoe.failure import Permanent
from vpmoe.storage import Bucket, paths


@dataclass(frozen=True)
class CanaryText:
    """One object of the canary."""

    sha256: str
    ids_T: Ids
    size: int
    """Bytes of the tokens that count: all but the first."""


@dataclass(frozen=True)
class CanaryWindow:
    """Tokens [start, stop) of a text, of which those from `first` on count."""

    start: int
    first: int
    stop: int


def split_windows(tokens: int, longest: int) -> list[CanaryWindow]:
    """The windows of a text of so many tokens, none longer than `longest`, which is 2 or more."""
    found, counted = [], 1
    for start in range(0, tokens, longest - longest // 2):
        stop = min(start + longest, tokens)
        if counted < stop:
            found.append(CanaryWindow(start, counted, stop))
            counted = stop
    return found


def read_texts(url: str, bucket: Bucket) -> list[CanaryText]:
    """The texts at an address of the bucket's store: the object of that name, and all objects below it as a folder, by their keys.

    Raises Permanent where there is none to measure, or one is no text; StorageError.
    """
    name, key = paths.split_url(url)
    of, key = bucket.other(name), key.rstrip("/")
    found = [
        _read_text(of, entry.key)
        for entry in of.list(key)
        if entry.key == key or entry.key.startswith(f"{key}/")
    ]
    if not sum(text.size for text in found):
        raise Permanent(
            f"evaluation.canary: there is no text at {url}. Put UTF-8 text there, an object or a folder of them, or drop the field."
        )
    return found


def texts_digest(found: Sequence[CanaryText]) -> str:
    """sha256 (hex) of the texts, whatever they are called."""
    return hashlib.sha256("".join(text.sha256 for text in found).encode()).hexdigest()


def _read_text(bucket: Bucket, key: str) -> CanaryText:
    data = bucket.get(key)
    try:
        ids_T = tokenizer().encode(data.decode())
    except ValueError as error:
        raise Permanent(
            f"evaluation.canary: {bucket.url(key)} cannot be encoded as text ({error}). Give UTF-8 text."
        ) from error
    first = len(vocabulary_file.encoding().decode_single_token_bytes(int(ids_T[0]))) if len(ids_T) else 0
    return CanaryText(hashlib.sha256(data).hexdigest(), ids_T, len(data) - first)
