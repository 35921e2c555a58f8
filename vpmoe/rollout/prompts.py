"""Prompts and completions as token ids: what the student is asked about a document, and how what it answers is read.

A prompt is the document up to its first supervised token with another effort in its system message, and the opening of the answer. Every
sampled token has a span, whatever was sampled; whether a completion is a good one is openai-harmony's word. Which prompts are asked is
windows.py's business, sampling the sampler's.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openai_harmony import (
    HarmonyEncoding,
    HarmonyEncodingName,
    HarmonyError,
    Role,
    StreamableParser,
    StreamState,
    load_harmony_encoding,
)

from vpmoe.data import vocabulary_file
from vpmoe.data.harmony import ROLE_ASSISTANT
from vpmoe.data.spans import FINAL, NOT_SUPERVISED, REASONING
from vpmoe.data.system_message import EffortSubstitution
from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import CALL, CHANNEL, END, MESSAGE, RETURN, START, STOP_IDS

VALID, NO_FINAL, UNCLOSED_REASONING, WRONG_ORDER, TRUNCATED = (
    "valid",
    "noFinal",
    "unclosedReasoning",
    "wrongOrder",
    "truncated",
)
VALIDITIES = (VALID, NO_FINAL, UNCLOSED_REASONING, WRONG_ORDER, TRUNCATED)


class Prompts:
    """How documents of one data set are put to the student."""

    def __init__(self, conversation: Mapping[str, Any]) -> None:
        """`conversation` is the data set's own, from its manifest: settings.conversation."""
        self._effort = cache(lambda effort: EffortSubstitution(conversation, effort))

    def ids(self, ids_T: Ids, spans_T: NDArray[np.uint8], effort: str) -> Ids:
        """The prompt that a document's ids and spans make at an effort, [P] int32; all of it has span 0.

        Raises Permanent where the document does not begin with the data set's system message, ValueError where nothing in it is supervised.
        """
        supervised = np.flatnonzero(spans_T != NOT_SUPERVISED)
        if not len(supervised):
            raise ValueError("a document without a supervised token makes no prompt")
        told: Ids = self._effort(effort).told(ids_T[: supervised[0]])
        return np.concatenate([told, np.array([START, ROLE_ASSISTANT], np.int32)])


def spans(ids_T: Ids) -> NDArray[np.uint8]:
    """The span of every token of a completion, [T] uint8: final in a final message from its header to its closing token, else reasoning.

    The completion goes on where the prompt ended, in the header of an assistant's message. A message is what openai-harmony takes for one:
    a header up to `<|message|>`, content up to `<|end|>`, `<|return|>` or `<|call|>`, and specials inside of either mean nothing. What
    stands between two messages is reasoning, and openai-harmony would read no further.
    """
    span_T = np.full(len(ids_T), REASONING, np.uint8)
    at = 0
    while at < len(ids_T):
        content = _next(ids_T, at, MESSAGE)
        end = _next(ids_T, content, END, RETURN, CALL)
        if _channel(ids_T[at:content]) == "final":
            span_T[at : end + 1] = FINAL
        at = _next(ids_T, end + 1, START)
    return span_T


def validity(ids_T: Ids) -> str:
    """Which of VALIDITIES a completion is; the first that fits, of:

    truncated: it does not end with a token of STOP_IDS. valid: any number of analysis messages closed by `<|end|>`, then one final message with
    some text, closed by `<|return|>`. unclosedReasoning: no final message, and the stop token fell inside an analysis message. noFinal: no
    final message with any text. wrongOrder: there is one, and something else that does not belong there or is in another place.
    """
    if not len(ids_T) or ids_T[-1] not in STOP_IDS:
        return TRUNCATED
    parser = StreamableParser(_harmony(), Role.ASSISTANT)
    try:
        for token in ids_T.tolist():
            parser.process(token)
        ended = parser.state == StreamState.EXPECT_START
    except HarmonyError:
        ended = False
    messages = parser.messages
    finals = [
        m
        for m in messages
        if m.channel == "final" and any(getattr(content, "text", "").strip() for content in m.content)
    ]
    if not finals:
        return UNCLOSED_REASONING if ended and messages and messages[-1].channel == "analysis" else NO_FINAL
    plain = all(
        m.author.role == Role.ASSISTANT and m.recipient is None and m.content_type is None for m in messages
    )
    in_order = [m.channel for m in messages] == ["analysis"] * (len(messages) - 1) + ["final"]
    return VALID if ended and plain and in_order and ids_T[-1] == RETURN else WRONG_ORDER


def _next(ids_T: Ids, start: int, *wanted: int) -> int:
    """Where one of the wanted ids stands at `start` or after it; the length where none does."""
    found = np.flatnonzero(np.isin(ids_T[start:], wanted))
    return start + int(found[0]) if len(found) else len(ids_T)


def _channel(header: Ids) -> str:
    """The channel that a header names, as openai-harmony reads it: from its first `<|channel|>` to a blank or a special token."""
    named = header[_next(header, 0, CHANNEL) + 1 :]
    text = vocabulary_file.encoding().decode(named.tolist())
    return text[
        : next((place for place, letter in enumerate(text) if letter.isspace() or letter == "<"), len(text))
    ]


@cache
def _harmony() -> HarmonyEncoding:
    vocabulary_file.install()
    return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
