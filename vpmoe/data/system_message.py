"""Reasoning effort: replaces the system message of a document, and maps log-probabilities back to the
document's own tokens.

Effort is a line of the system message and nothing else, so everything after that message is kept as it is.
The documents of a dataset may have different efforts: each one's own is read from its first tokens. No model
here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.effort import effort_shares
from vpmoe.data import vocabulary_file
from vpmoe.data.harmony import ROLE_SYSTEM, SystemMessage, system_text
from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import END, END_OF_DOCUMENT, MESSAGE, START
from vpmoe.failure import Permanent


class EffortSubstitution:
    """Puts `effort` into the system messages of the documents of one dataset, whichever effort they have."""

    def __init__(self, conversation: Mapping[str, Any], effort: str) -> None:
        """`conversation`: settings.conversation in the dataset's manifest."""
        said = (conversation["identity"], conversation["knowledgeCutoff"], conversation["date"])
        self._own = [
            system_message(SystemMessage(*said, each)) for each in effort_shares(conversation["effort"])
        ]
        self._replacement = system_message(SystemMessage(*said, effort))

    @property
    def extra_tokens(self) -> int:
        """The most that `to_teacher(ids)` is longer than `ids`; may be negative."""
        return len(self._replacement) - min(map(len, self._own)) - 1

    def to_teacher(self, ids_T: Ids) -> Ids:
        """The ids that the teacher scores for a document: `replace`, without the end-of-document token.

        Raises Permanent as `replace` does, and if the document has no end-of-document token.
        """
        if ids_T[-1] != END_OF_DOCUMENT:
            raise _foreign("has no end-of-document token")
        return self.replace(ids_T[:-1])

    def replace(self, ids_T: Ids) -> Ids:
        """The ids with the other system message. Raises Permanent if they do not begin with one of the
        dataset's."""
        return np.concatenate([self._replacement, ids_T[self._own_length(ids_T) :]])

    def from_teacher(self, ids_T: Ids, logp_S: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map log-probabilities of `to_teacher(ids_T)` to the tokens of `ids_T`, [T]; NaN for its system
        message and its end."""
        logp_T = np.full(len(ids_T), np.nan, np.float32)
        logp_T[self._own_length(ids_T) : -1] = logp_S[len(self._replacement) :]
        return logp_T

    def _own_length(self, ids_T: Ids) -> int:
        """Tokens of a document's own system message.

        At most one of the dataset's fits: none is the start of another, because the token that ends a message
        occurs nowhere else in it.
        """
        for own in self._own:
            if np.array_equal(ids_T[: len(own)], own):
                return len(own)
        raise _foreign("does not begin with the system message of its dataset's settings.conversation")


def _foreign(what: str) -> Permanent:
    return Permanent(
        f"a document {what}. It was not written by preprocess; delete the dataset's folder to have it built "
        "again."
    )


def system_message(setting: SystemMessage) -> Ids:
    """Ids of the whole message, its special tokens included."""
    return np.array(
        [START, ROLE_SYSTEM, MESSAGE, *vocabulary_file.encoding().encode_ordinary(system_text(setting)), END],
        np.int32,
    )
