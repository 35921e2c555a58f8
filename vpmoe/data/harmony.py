"""Renders one SYNTH row as a Harmony conversation: token ids, and the number of tokens of each span.

The ids are assembled by hand around the tokenizer, which is far faster than openai-harmony; the tests compare
every id and span with openai-harmony. Only what training needs is rendered: one system, one user and one or
two assistant messages, no tools. Which rows are rendered is decided in preprocess/filters.py and
preprocess/sampling.py.
"""

from dataclasses import dataclass

import numpy as np

from vpmoe.data.tokenizer import Ids, Tokenizer
from vpmoe.data.vocabulary import CHANNEL, END, END_OF_DOCUMENT, MESSAGE, RETURN, START

ROLE_SYSTEM = 17360
ROLE_USER = 1428
ROLE_ASSISTANT = 173781
CHANNEL_ANALYSIS = 35644
CHANNEL_FINAL = 17196
"""Ids of the words in message headers."""

CHANNELS = "# Valid channels: analysis, commentary, final. Channel must be included for every message."


@dataclass(frozen=True)
class SystemMessage:
    """Content of a document's system message: `spec.dataset.conversation`, with the one effort that was
    drawn for the document if there are shares. All of it is pinned, because it is part of the data."""

    identity: str
    knowledge_cutoff: str
    date: str | None
    effort: str


@dataclass(frozen=True)
class HarmonyDocument:
    """A conversation of T tokens: prompt (not supervised), analysis message, final message, one
    end-of-document token."""

    ids: Ids
    """[T] int32"""
    reasoning: int
    """Tokens of the whole analysis message, including its header and end; 0 if there is none."""
    final: int
    """Tokens of the whole final message, including its header and `<|return|>`."""

    @property
    def prompt(self) -> int:
        """Tokens before the first assistant message."""
        return len(self.ids) - self.reasoning - self.final - 1


def system_text(system: SystemMessage) -> str:
    """The text of the system message as openai-harmony writes it, without the date line if there is no date.

    The reasoning effort is one line of it and appears nowhere else.
    """
    date = f"\nCurrent date: {system.date}" if system.date is not None else ""
    dates = f"Knowledge cutoff: {system.knowledge_cutoff}{date}"
    return f"{system.identity}\n{dates}\n\nReasoning: {system.effort}\n\n{CHANNELS}"


def user_text(query: str, seed_text: str | None) -> str:
    """The question, followed by its reference text if there is one. Constraints are never rendered: they
    contain the answer."""
    if seed_text is None or not seed_text.strip():
        return query
    return f"{query}\n\nReference:\n{seed_text}"


class Renderer:
    """Renders rows with one system message, which is tokenized once."""

    def __init__(self, tokenizer: Tokenizer, system: SystemMessage) -> None:
        self._encode = tokenizer.encode
        system_ids = tokenizer.encode(system_text(system))
        self._before_user = _ids(START, ROLE_SYSTEM, MESSAGE, *system_ids, END, START, ROLE_USER, MESSAGE)
        self._before_reasoning = _ids(END, START, ROLE_ASSISTANT, CHANNEL, CHANNEL_ANALYSIS, MESSAGE)
        self._before_final = _ids(END, START, ROLE_ASSISTANT, CHANNEL, CHANNEL_FINAL, MESSAGE)
        self._after_final = _ids(RETURN, END_OF_DOCUMENT)

    def render(
        self, query: str, seed_text: str | None, reasoning: str | None, answer: str
    ) -> HarmonyDocument:
        """The conversation of one row. Special tokens in the text are encoded as ordinary text; blank
        reasoning makes no message.

        Raises what Tokenizer.encode raises.
        """
        pieces = [self._before_user, self._encode(user_text(query, seed_text))]
        reasoning_tokens = 0
        if reasoning is not None and reasoning.strip():
            pieces += self._before_reasoning, self._encode(reasoning)
            reasoning_tokens = len(self._before_reasoning) + len(pieces[-1])
        # The <|end|> at the start of each header belongs to the message before: one id less here, one more
        # there.
        pieces += self._before_final, self._encode(answer), self._after_final
        final_tokens = len(self._before_final) - 1 + len(pieces[-2]) + 1
        return HarmonyDocument(np.concatenate(pieces), reasoning_tokens, final_tokens)


def _ids(*ids: int) -> Ids:
    return np.array(ids, dtype=np.int32)
