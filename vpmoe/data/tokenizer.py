"""Text to token ids: tiktoken's, id for id, several times faster.

gigatoken reads the very same vocabulary file. The two can only differ where their Unicode tables do, about letters and marks that are
younger than one of them. Such a character is younger than the vocabulary as well, so it has no token of its own and comes out in pieces
of its bytes. Those pieces are looked at: where they make a character that Unicode 15 does not know, tiktoken has the word. That one of the
two may have an error is met by encoding some texts with both. Where the vocabulary comes from is vocabulary.py's business.
"""

import unicodedata
from functools import cache

import gigatoken
import numpy as np
from numpy.typing import NDArray

from vpmoe.data import vocabulary, vocabulary_file
from vpmoe.failure import Permanent

Ids = NDArray[np.int32]

CHECKED = 128
"""Of so many texts one is encoded by tiktoken too: a tenth of the time that encoding takes."""


class Tokenizer:
    """o200k, for text only: specials in it are ordinary text."""

    def __init__(self) -> None:
        """Takes about a second: both tokenizers read the vocabulary."""
        self._tiktoken = vocabulary_file.encoding()
        self._gigatoken = gigatoken.Tokenizer.from_tiktoken(
            vocabulary_file.install() / vocabulary_file.FOR_HARMONY, "o200k", {}
        )
        contents = [self._tiktoken.decode_single_token_bytes(token) for token in range(vocabulary.TEXT_IDS)]
        self._piece_V = np.array([_is_piece(content) for content in contents])
        self._texts = 0

    def encode(self, text: str) -> Ids:
        """Ids [T] of a text without surrogates (text.py replaces them).

        Raises ValueError where only tiktoken can be asked and it cannot take the text (a run of a million blanks); Permanent where the
        two tokenizers differ, which is an error in one of them.
        """
        self._texts += 1
        ids: Ids = self._gigatoken.encode(text).view(np.int32)
        pieces = ids[self._piece_V[ids]]
        if len(pieces) and not _known(self._tiktoken.decode_bytes(pieces.tolist()).decode()):
            return self._reference(text)
        if self._texts % CHECKED == 0:
            self._check(text, ids)
        return ids

    def _reference(self, text: str) -> Ids:
        return self._tiktoken.encode_to_numpy(text, disallowed_special=()).view(np.int32)

    def _check(self, text: str, ids: Ids) -> None:
        try:
            same = np.array_equal(ids, self._reference(text))
        except ValueError:
            return  # tiktoken cannot take it: there is nothing to compare with
        if not same:
            raise Permanent(
                f"gigatoken and tiktoken give different ids for {text[:200]!r}… ({len(text)} characters): one of them has an error. "
                "Nothing of this part was written. Report the text, and go on with a version of vpmoe in which they agree."
            )


def _is_piece(content: bytes) -> bool:
    """Whether a token begins or ends inside a character."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return True
    return False


def _known(text: str) -> bool:
    """Whether this Python's Unicode tables (15.0) know every character."""
    return all(unicodedata.category(character) != "Cn" for character in set(text))


@cache
def tokenizer() -> Tokenizer:
    """The tokenizer, made once a process."""
    return Tokenizer()
