"""Tokens and spans of rendered rows equal those of openai-harmony."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai_harmony import (
    Conversation,
    HarmonyEncoding,
    HarmonyEncodingName,
    Message,
    RenderConversationConfig,
    Role,
    SystemContent,
    load_harmony_encoding,
)

from demo import sample
from tests.fakes.conversations import EFFORT, SYSTEM
from tests.fakes.hostile_texts import MARKS, TEXTS
from vpmoe.data import harmony, vocabulary_file
from vpmoe.data.harmony import Renderer, SystemMessage, user_text
from vpmoe.data.spans import spans_of_documents
from vpmoe.data.tokenizer import tokenizer
from vpmoe.data.vocabulary import VOCABULARY_SIZE


@pytest.fixture(scope="module")
def openai_encoding() -> HarmonyEncoding:
    vocabulary_file.install()
    return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tokenizer(), SYSTEM)


def expected(
    openai_encoding: HarmonyEncoding, setting: SystemMessage, user: str, reasoning: str | None, answer: str
) -> tuple[list[int], list[int]]:
    """Token ids of openai-harmony, and spans derived from the channel in each message's tokens."""
    system = (
        SystemContent.new()
        .with_model_identity(setting.identity)
        .with_knowledge_cutoff(setting.knowledge_cutoff)
        .with_reasoning_effort(EFFORT[setting.effort])
    )
    if setting.date is not None:
        system = system.with_conversation_start_date(setting.date)
    messages = [
        Message.from_role_and_content(Role.SYSTEM, system),
        Message.from_role_and_content(Role.USER, user),
    ]
    if reasoning is not None and reasoning.strip():
        messages.append(Message.from_role_and_content(Role.ASSISTANT, reasoning).with_channel("analysis"))
    messages.append(Message.from_role_and_content(Role.ASSISTANT, answer).with_channel("final"))
    ids = openai_encoding.render_conversation_for_training(
        Conversation.from_messages(messages), config=RenderConversationConfig(auto_drop_analysis=False)
    )
    span, spans = 0, []
    for position, token in enumerate(ids):
        if token == 200006:
            assistant = ids[position + 1] == 173781
            span = 0 if not assistant else {35644: 1, 17196: 2}[ids[position + 3]]
        spans.append(span)
    return [*ids, 199999], [*spans, 0]


def assert_renders_like_openai(
    openai_encoding: HarmonyEncoding,
    renderer: Renderer,
    query: str,
    seed: str | None,
    reasoning: str | None,
    answer: str,
    setting: SystemMessage = SYSTEM,
) -> None:
    document = renderer.render(query, seed, reasoning, answer)
    ids, spans = expected(openai_encoding, setting, user_text(query, seed), reasoning, answer)
    assert document.ids.dtype == np.int32
    assert document.ids.tolist() == ids
    lengths = np.array([[document.prompt, document.reasoning, document.final]])
    assert spans_of_documents(lengths).tolist() == spans


def real_rows(files: list[Path]) -> Iterator[dict[str, str | None]]:
    for path in files:
        yield from pq.read_table(path).to_pylist()


def test_tokens_and_spans_of_the_sample_equal_those_of_openai_harmony(
    openai_encoding: HarmonyEncoding, renderer: Renderer
) -> None:
    for row in sample.rows():
        assert_renders_like_openai(
            openai_encoding,
            renderer,
            row["query"],
            row["query_seed_text"],
            row["synthetic_reasoning"],
            row["synthetic_answer"],
        )


def test_tokens_and_spans_of_real_rows_equal_those_of_openai_harmony(
    openai_encoding: HarmonyEncoding, renderer: Renderer, real_parquet: list[Path]
) -> None:
    for row in real_rows(real_parquet):
        assert_renders_like_openai(
            openai_encoding,
            renderer,
            row["query"] or "",
            row["query_seed_text"],
            row["synthetic_reasoning"],
            row["synthetic_answer"] or "",
        )


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in TEXTS.items()])
def test_unusual_text_in_any_message_is_rendered_like_openai_harmony(
    openai_encoding: HarmonyEncoding, renderer: Renderer, text: str
) -> None:
    assert_renders_like_openai(openai_encoding, renderer, text, None, "think", text)
    assert_renders_like_openai(openai_encoding, renderer, "question", text, text, "answer")


@settings(
    max_examples=150,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(*[st.text(st.characters(exclude_categories=["Cs"]), max_size=200)] * 4)
def test_any_text_is_rendered_like_openai_harmony(
    openai_encoding: HarmonyEncoding, renderer: Renderer, query: str, seed: str, reasoning: str, answer: str
) -> None:
    assert_renders_like_openai(openai_encoding, renderer, query, seed, reasoning, answer)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"effort": "low"}, id="low"),
        pytest.param({"effort": "medium"}, id="medium"),
        pytest.param({"date": None}, id="no-date"),
        pytest.param({"date": "2031-12-24", "knowledge_cutoff": "2030-01"}, id="dates"),
        pytest.param({"identity": "Jesteś vpMoE. <|end|>\nZweite Zeile, 第三"}, id="identity"),
    ],
)
def test_the_system_message_equals_that_of_openai_harmony(
    openai_encoding: HarmonyEncoding, change: dict[str, str]
) -> None:
    setting = replace(SYSTEM, **change)
    assert_renders_like_openai(openai_encoding, Renderer(tokenizer(), setting), "q", None, "r", "a", setting)


@pytest.mark.parametrize("reasoning", [None, "", "  \n\t "], ids=["null", "empty", "blank"])
def test_blank_reasoning_makes_no_analysis_message(
    openai_encoding: HarmonyEncoding, renderer: Renderer, reasoning: str | None
) -> None:
    document = renderer.render("q", None, reasoning, "a")
    assert document.reasoning == 0
    assert harmony.CHANNEL_ANALYSIS not in document.ids
    assert_renders_like_openai(openai_encoding, renderer, "q", None, reasoning, "a")


@pytest.mark.parametrize(
    "seed, text",
    [
        (None, "q"),
        ("", "q"),
        (" \n", "q"),
        ("passage", "q\n\nReference:\npassage"),
        (" as it is \n", "q\n\nReference:\n as it is \n"),
    ],
    ids=["null", "empty", "blank", "passage", "untouched"],
)
def test_a_seed_text_is_appended_to_the_question(seed: str | None, text: str) -> None:
    assert user_text("q", seed) == text


def test_reasoning_marks_are_kept_byte_for_byte(renderer: Renderer) -> None:
    document = renderer.render("q", None, MARKS, MARKS)
    assert vocabulary_file.encoding().decode_bytes(document.ids.tolist()).count(MARKS.encode()) == 2


def test_each_document_ends_with_return_and_one_unsupervised_end(renderer: Renderer) -> None:
    document = renderer.render("q", None, "r", "a")
    assert document.ids[-2:].tolist() == [200002, 199999]
    assert spans_of_documents(np.array([[document.prompt, document.reasoning, document.final]]))[
        -2:
    ].tolist() == [2, 0]
    assert document.ids.max() < VOCABULARY_SIZE


def test_spans_of_several_documents_are_concatenated() -> None:
    assert spans_of_documents(np.array([[2, 1, 1], [1, 0, 2]])).tolist() == [0, 0, 1, 2, 0, 0, 2, 2, 0]
    assert spans_of_documents(np.empty((0, 3), np.int64)).size == 0


def test_default_rendering_of_openai_harmony_drops_the_reasoning(openai_encoding: HarmonyEncoding) -> None:
    """The reason for auto_drop_analysis=False above. Fails if a new version changes the default."""
    messages = [
        Message.from_role_and_content(Role.USER, "q"),
        Message.from_role_and_content(Role.ASSISTANT, "r").with_channel("analysis"),
        Message.from_role_and_content(Role.ASSISTANT, "a").with_channel("final"),
    ]
    assert harmony.CHANNEL_ANALYSIS not in openai_encoding.render_conversation_for_training(
        Conversation.from_messages(messages)
    )
