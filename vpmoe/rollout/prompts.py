"""Prompts and completions as token ids: how a document becomes a prompt, and how a completion is read.

A prompt is the document up to its first supervised token, with another effort in its system message, followed
by the start of an assistant message. Every sampled token has a span, whatever was sampled. openai-harmony
decides whether a completion is valid. Which prompts a window has is in windows.py.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

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
from vpmoe.rollout.validity import NO_FINAL, TRUNCATED, UNCLOSED_REASONING, VALID, WRONG_ORDER


class PromptBuilder:
    """Makes prompts of the documents of one dataset."""

    def __init__(self, conversation: Mapping[str, Any]) -> None:
        """`conversation`: settings.conversation in the dataset's manifest."""
        self._substitution = cache(lambda effort: EffortSubstitution(conversation, effort))

    def build(self, ids_T: Ids, spans_T: NDArray[np.uint8], effort: str) -> Ids:
        """The prompt of a document at an effort, [P] int32, given the document's ids and spans.

        Its tokens have span 0.

        Raises Permanent if the document does not begin with the dataset's system message, ValueError if none
        of its tokens is supervised.
        """
        supervised = np.flatnonzero(spans_T != NOT_SUPERVISED)
        if not len(supervised):
            raise ValueError("a document without a supervised token makes no prompt")
        prompt: Ids = self._substitution(effort).replace(ids_T[: supervised[0]])
        return np.concatenate([prompt, np.array([START, ROLE_ASSISTANT], np.int32)])


def completion_spans(ids_T: Ids) -> NDArray[np.uint8]:
    """The span of every token of a completion, [T] uint8: final for a whole final message, reasoning for
    everything else.

    A final message includes its header and its closing token. The completion begins where the prompt ends, in
    the header of an assistant message. Messages are parsed as by openai-harmony: a header up to
    `<|message|>`, content up to `<|end|>`, `<|return|>` or `<|call|>`; other special tokens inside of either
    have no meaning. Tokens between two messages, where openai-harmony would stop with an error, are
    reasoning.
    """
    span_T = np.full(len(ids_T), REASONING, np.uint8)
    for message in completion_messages(ids_T):
        if message.channel == "final":
            span_T[message.start : message.end + 1] = FINAL
    return span_T


class CompletionMessage(NamedTuple):
    """A message of a completion: its header is [start, content), its content (content, end)."""

    start: int
    content: int
    """Place of `<|message|>`; the completion's length if it ends within the header."""
    end: int
    """Place of the token that closes the message; the completion's length if none does."""
    channel: str
    """The channel that the header names; empty if it names none."""


def completion_messages(ids_T: Ids) -> Iterator[CompletionMessage]:
    """The messages of a completion, parsed as `completion_spans` says."""
    at = 0
    while at < len(ids_T):
        content = _find_next(ids_T, at, MESSAGE)
        end = _find_next(ids_T, content, END, RETURN, CALL)
        yield CompletionMessage(at, content, end, _channel_name(ids_T[at:content]))
        at = _find_next(ids_T, end + 1, START)


def completion_validity(ids_T: Ids) -> str:
    """Which of validity.VALIDITIES a completion is.

    The first that applies of truncated, valid, unclosedReasoning, noFinal and wrongOrder.

    openai-harmony parses the completion together with the `<|start|>assistant` that ends its prompt, because
    the sampled header continues that one: with a parser that is told the role, a completion that says the
    role again would be valid. A valid completion is one that openai-harmony parses, and in addition: all
    messages are the assistant's, without a name, a recipient or a content type; all but the last are analysis
    and the last is final and has text; and it ends with `<|return|>`.
    """
    if not len(ids_T) or ids_T[-1] not in STOP_IDS:
        return TRUNCATED
    parser = StreamableParser(_harmony(), role=None)
    try:
        for token in (START, ROLE_ASSISTANT, *ids_T.tolist()):
            parser.process(token)
        parser.process_eos()
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
        (m.author.role, m.author.name, m.recipient, m.content_type) == (Role.ASSISTANT, None, None, None)
        for m in messages
    )
    in_order = [m.channel for m in messages] == ["analysis"] * (len(messages) - 1) + ["final"]
    return VALID if ended and plain and in_order and ids_T[-1] == RETURN else WRONG_ORDER


def _find_next(ids_T: Ids, start: int, *wanted: int) -> int:
    """Index of the first of the `wanted` ids from `start` on; the length if there is none."""
    found = np.flatnonzero(np.isin(ids_T[start:], wanted))
    return start + int(found[0]) if len(found) else len(ids_T)


def _channel_name(header: Ids) -> str:
    """The channel of a header, parsed as by openai-harmony: from the first `<|channel|>` to white space or a
    special token."""
    named = header[_find_next(header, 0, CHANNEL) + 1 :]
    text = vocabulary_file.encoding().decode(named.tolist())
    return text[
        : next((place for place, letter in enumerate(text) if letter.isspace() or letter == "<"), len(text))
    ]


@cache
def _harmony() -> HarmonyEncoding:
    vocabulary_file.install()
    return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
