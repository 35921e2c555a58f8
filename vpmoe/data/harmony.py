"""One SYNTH row as a Harmony conversation: token ids, and how many of them belong to each span.

Ids are assembled by hand around the tokenizer, which is far faster than openai-harmony; the tests hold every id and span against
openai-harmony. Only what training needs is rendered: one system, one user and one or two assistant messages, no tools.
Which rows are rendered at all is decided in filters.py and sampling.py.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vpmoe.data.tokenizer import Ids, Tokenizer

END_OF_DOCUMENT = 199999
RETURN = 200002
CALL = 200012
CHANNEL = 200005
START = 200006
END = 200007
MESSAGE = 200008
SYSTEM = 17360
USER = 1428
ASSISTANT = 173781
ANALYSIS = 35644
FINAL = 17196

VOCABULARY = 201_088
"""Ids 0 … 201,087, all of them defined. openai-harmony also decodes 201088, which is an error of it; we never write that id."""

NOT_SUPERVISED, REASONING, ANSWER = 0, 1, 2
"""Span of a token, stored against the token itself: the prompt and the end of document, the analysis message, the final message."""

CHANNELS = "# Valid channels: analysis, commentary, final. Channel must be included for every message."


@dataclass(frozen=True)
class Setting:
    """What the system message says: `spec.dataset.conversation`. All of it is pinned, because it is part of the data."""

    identity: str
    knowledge_cutoff: str
    date: str | None
    effort: str


@dataclass(frozen=True)
class Document:
    """A conversation of T tokens: `prompt` not supervised, then `reasoning`, then `final`, then one end-of-document token."""

    ids: Ids
    """[T] int32"""
    reasoning: int
    """Tokens of the whole analysis message, its wrapper included; 0 where there is none."""
    final: int
    """Tokens of the whole final message, its wrapper and `<|return|>` included."""

    @property
    def prompt(self) -> int:
        return len(self.ids) - self.reasoning - self.final - 1


def system_text(setting: Setting) -> str:
    """The system message as openai-harmony words it; without a date that line is left out. Effort is a line of it and nothing else."""
    date = f"\nCurrent date: {setting.date}" if setting.date is not None else ""
    return f"{setting.identity}\nKnowledge cutoff: {setting.knowledge_cutoff}{date}\n\nReasoning: {setting.effort}\n\n{CHANNELS}"


def user_text(query: str, seed_text: str | None) -> str:
    """The question, followed by the text it is about where there is one. Constraints are never rendered: they hold the answer."""
    if seed_text is None or not seed_text.strip():
        return query
    return f"{query}\n\nReference:\n{seed_text}"


class Renderer:
    """Renders rows below one system message, which is tokenized once."""

    def __init__(self, tokenizer: Tokenizer, setting: Setting) -> None:
        self._encode = tokenizer.encode
        system = tokenizer.encode(system_text(setting))
        self._before_user = _ids(START, SYSTEM, MESSAGE, *system, END, START, USER, MESSAGE)
        self._before_reasoning = _ids(END, START, ASSISTANT, CHANNEL, ANALYSIS, MESSAGE)
        self._before_final = _ids(END, START, ASSISTANT, CHANNEL, FINAL, MESSAGE)
        self._after_final = _ids(RETURN, END_OF_DOCUMENT)

    def render(self, query: str, seed_text: str | None, reasoning: str | None, answer: str) -> Document:
        """The conversation of one row. Text is taken as it is, specials in it as ordinary text; blank reasoning makes no message.

        Raises what Tokenizer.encode raises.
        """
        pieces = [self._before_user, self._encode(user_text(query, seed_text))]
        reasoning_tokens = 0
        if reasoning is not None and reasoning.strip():
            pieces += self._before_reasoning, self._encode(reasoning)
            reasoning_tokens = len(self._before_reasoning) + len(pieces[-1])
        # The <|end|> that opens each wrapper closes the message before it: one id less here, one more there.
        pieces += self._before_final, self._encode(answer), self._after_final
        final_tokens = len(self._before_final) - 1 + len(pieces[-2]) + 1
        return Document(np.concatenate(pieces), reasoning_tokens, final_tokens)


def spans(lengths_D3: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Span of every token of D consecutive documents, from their (prompt, reasoning, final) lengths. [Σ lengths + D] uint8."""
    documents = len(lengths_D3)
    counts_D4 = np.concatenate([lengths_D3, np.ones((documents, 1), dtype=np.int64)], axis=1)
    pattern = np.array([NOT_SUPERVISED, REASONING, ANSWER, NOT_SUPERVISED], dtype=np.uint8)
    return np.repeat(np.tile(pattern, documents), counts_D4.ravel())


def _ids(*ids: int) -> Ids:
    return np.array(ids, dtype=np.int32)
