"""The reasoning effort that a model is told: another system message before the same document, and the way back to its own tokens.

Effort is a line of the system message and nothing else, so what comes after that message is sent as it is. No model here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpmoe.data import vocabulary_file
from vpmoe.data.harmony import ROLE_SYSTEM, SystemMessage, system_text
from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import END, END_OF_DOCUMENT, MESSAGE, START
from vpmoe.failure import Permanent


class EffortSubstitution:
    """How documents of one data set are put to a model that is told `effort`."""

    def __init__(self, conversation: Mapping[str, Any], effort: str) -> None:
        """`conversation` is the data set's own, from its manifest: settings.conversation."""
        said = (conversation["identity"], conversation["knowledgeCutoff"], conversation["date"])
        self._own = system_message(SystemMessage(*said, conversation["effort"]))
        self._told = system_message(SystemMessage(*said, effort))

    @property
    def extra_tokens(self) -> int:
        """Tokens that a document grows by when it is sent; negative where it shrinks. Its end-of-document token is not sent."""
        return len(self._told) - len(self._own) - 1

    def to_teacher(self, ids_T: Ids) -> Ids:
        """The ids to send for a document: all but its end. Raises Permanent as `told` does, and where it has no end."""
        if ids_T[-1] != END_OF_DOCUMENT:
            raise _foreign("has no end-of-document token")
        return self.replace(ids_T[:-1])

    def replace(self, ids_T: Ids) -> Ids:
        """The ids with another system message. Raises Permanent where they do not begin with the data set's."""
        if not np.array_equal(ids_T[: len(self._own)], self._own):
            raise _foreign("does not begin with the system message of its data set's settings.conversation")
        return np.concatenate([self._told, ids_T[len(self._own) :]])

    def from_teacher(self, logp_S: NDArray[np.float32]) -> NDArray[np.float32]:
        """Log-probabilities of the ids sent, stored against the document's own tokens [T]; NaN for its system message and its end."""
        after = logp_S[len(self._told) :]
        logp_T = np.full(len(self._own) + len(after) + 1, np.nan, np.float32)
        logp_T[len(self._own) : -1] = after
        return logp_T


def _foreign(what: str) -> Permanent:
    return Permanent(
        f"a document {what}. It was not written by preprocess; delete the data set's folder to have it made again."
    )


def system_message(setting: SystemMessage) -> Ids:
    """Ids of the whole message, its wrapper included."""
    return np.array(
        [START, ROLE_SYSTEM, MESSAGE, *vocabulary_file.encoding().encode_ordinary(system_text(setting)), END],
        np.int32,
    )
