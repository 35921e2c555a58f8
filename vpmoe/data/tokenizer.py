"""Text to token ids: the same ids as tiktoken, several times faster.

gigatoken reads the same vocabulary file as tiktoken. The two can differ only if their Unicode tables
differ: for characters that are newer than one of the tables. Such a character is newer than the vocabulary
too, so it has no token of its own and is encoded as pieces of its bytes. We inspect those pieces: if they
form a character that Unicode 15 does not know, tiktoken encodes the text. To detect errors in either
tokenizer, a sample of the texts is encoded with both. The vocabulary comes from vocabulary_file.py.
"""

import unicodedata
from functools import cache

import gigatoken
import numpy as np
from numpy.typing import NDArray

from vpmoe.data import vocabulary, vocabulary_file
from vpmoe.failure import Permanent

Ids = NDArray[np.int32]

CHECK_INTERVAL = 128
"""One text in this many is also encoded by tiktoken. The check takes a tenth of the encoding time."""


class Tokenizer:
    """o200k for text only: special tokens in the text are encoded as ordinary text."""

    def __init__(self) -> None:
        """Reads the vocabulary into both tokenizers, which takes about a second."""
        self._tiktoken = vocabulary_file.encoding()
        self._gigatoken = gigatoken.Tokenizer.from_tiktoken(
            vocabulary_file.install() / vocabulary_file.FOR_HARMONY, "o200k", {}
        )
        contents = [self._tiktoken.decode_single_token_bytes(token) for token in range(vocabulary.TEXT_IDS)]
        self._piece_V = np.array([_is_piece(content) for content in contents])
        self._texts = 0

    def encode(self, text: str) -> Ids:
        """Ids [T] of a text without surrogates (preprocess/text.py replaces them).

        Raises ValueError if only tiktoken may encode the text and fails (a run of a million blanks);
        Permanent if the two tokenizers differ, which is an error in one of them.
        """
        self._texts += 1
        ids: Ids = self._gigatoken.encode(text).view(np.int32)
        pieces = ids[self._piece_V[ids]]
        if len(pieces) and not _known(self._tiktoken.decode_bytes(pieces.tolist()).decode()):
            return self._reference(text)
        if self._texts % CHECK_INTERVAL == 0:
            self._check(text, ids)
        return ids

    def _reference(self, text: str) -> Ids:
        return self._tiktoken.encode_to_numpy(text, disallowed_special=()).view(np.int32)

    def _check(self, text: str, ids: Ids) -> None:
        try:
            same = np.array_equal(ids, self._reference(text))
        except ValueError:
            return  # tiktoken cannot encode it: there is nothing to compare with
        if not same:
            raise Permanent(
                f"gigatoken and tiktoken give different ids for {text[:200]!r}… ({len(text)} characters): "
                "one "
                "of them has an error. Nothing of this part was written. Report the text and use a version "
                "of vpmoe in which they agree."
            )


def _is_piece(content: bytes) -> bool:
    """Whether a token begins or ends inside a character."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return True
    return False


def _known(text: str) -> bool:
    """Whether this Python's Unicode tables (15.0) contain every character of the text."""
    return all(unicodedata.category(character) != "Cn" for character in set(text))


@cache
def tokenizer() -> Tokenizer:
    """The tokenizer, created once per process."""
    return Tokenizer()
