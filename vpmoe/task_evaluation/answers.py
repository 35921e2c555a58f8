"""Questions as prompts and completions as answers. Pure.

An answer is the text of the final message, if the model ended its completion.
"""

from dataclasses import dataclass

import numpy as np

from vpmoe.data import vocabulary_file
from vpmoe.data.harmony import ROLE_ASSISTANT, ROLE_USER, SystemMessage
from vpmoe.data.spans import FINAL
from vpmoe.data.system_message import system_message
from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import END, MESSAGE, START
from vpmoe.rollout.prompts import completion_messages, completion_spans, completion_validity
from vpmoe.rollout.validity import TRUNCATED


@dataclass(frozen=True)
class Answer:
    """A completion as an answer."""

    text: str
    """Of the last final message; empty if there is none, or the completion was cut off."""
    validity: str
    """One of validity.VALIDITIES."""
    reasoning_tokens: int
    """Tokens that are not of a final message."""
    final_tokens: int

    @property
    def cut_off(self) -> bool:
        """Whether the completion ended at the limit of tokens."""
        return self.validity == TRUNCATED


def prompt(system: SystemMessage, question: str) -> Ids:
    """The prompt of a question [P], as in training. Special tokens in its text are ordinary text."""
    user = [START, ROLE_USER, MESSAGE, *vocabulary_file.encoding().encode_ordinary(question), END]
    return np.concatenate([system_message(system), np.array([*user, START, ROLE_ASSISTANT], np.int32)])


def read_answer(ids_C: Ids) -> Answer:
    """The answer in a completion."""
    validity, final = completion_validity(ids_C), int(np.sum(completion_spans(ids_C) == FINAL))
    text = ""
    if validity != TRUNCATED:
        for message in completion_messages(ids_C):
            if message.channel == "final":
                content = ids_C[message.content + 1 : message.end]
                text = vocabulary_file.encoding().decode(content.tolist()).strip()
    return Answer(text, validity, len(ids_C) - final, final)
