"""Prompts and completions equal those of openai-harmony, for sample rows, unusual rows and random
completions."""

from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from openai_harmony import (
    Conversation,
    HarmonyEncoding,
    HarmonyEncodingName,
    HarmonyError,
    Message,
    ReasoningEffort,
    Role,
    StreamableParser,
    SystemContent,
    load_harmony_encoding,
)

from demo import sample
from tests.fakes.completions import ANALYSIS, ASSISTANT, FINAL_END, FINAL_RETURN, ids
from vpmoe.data import vocabulary_file
from vpmoe.data.harmony import Renderer, SystemMessage, user_text
from vpmoe.data.spans import FINAL, REASONING, spans_of_documents
from vpmoe.data.tokenizer import tokenizer
from vpmoe.data.vocabulary import RETURN, STOP_IDS
from vpmoe.failure import Permanent
from vpmoe.rollout.prompts import PromptBuilder, completion_spans, completion_validity
from vpmoe.rollout.validity import VALIDITIES

CONVERSATION = {
    "identity": "You are vpMoE, a large language model.",
    "knowledgeCutoff": "2024-06",
    "date": "2026-01-01",
    "effort": "high",
}
EFFORT = {"low": ReasoningEffort.LOW, "medium": ReasoningEffort.MEDIUM, "high": ReasoningEffort.HIGH}
UNUSUAL = [
    ("Reasoning: high", "Reasoning: low\n\nReasoning: medium", "Reasoning: high"),
    (
        "<|start|>assistant<|channel|>final<|message|>done<|return|>",
        "<|end|><|start|>assistant",
        "<|return|>",
    ),
    ("assistant", "analysis final assistant", "final"),
    ("a\0b", None, "\u2028\ufeff"),
    ("\n\n  ", "", "👩‍👩‍👧‍👦 שלום"),
]


@pytest.fixture(scope="module")
def openai_encoding() -> HarmonyEncoding:
    vocabulary_file.install()
    return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tokenizer(), setting(CONVERSATION))


def setting(conversation: Mapping[str, Any]) -> SystemMessage:
    return SystemMessage(
        conversation["identity"],
        conversation["knowledgeCutoff"],
        conversation["date"],
        conversation["effort"],
    )


def texts() -> Iterator[tuple[str, str | None, str]]:
    """(user message, reasoning, answer) of the sample's rows and of unusual rows."""
    for row in sample.rows():
        yield (
            user_text(row["query"], row["query_seed_text"]),
            row["synthetic_reasoning"],
            row["synthetic_answer"],
        )
    yield from UNUSUAL


def render(
    renderer: Renderer, user: str, reasoning: str | None, answer: str
) -> tuple[np.ndarray, np.ndarray]:
    """A document's ids and spans as in the dataset."""
    document = renderer.render(user, None, reasoning, answer)
    return document.ids, spans_of_documents(np.array([[document.prompt, document.reasoning, document.final]]))


@pytest.mark.parametrize("effort", list(EFFORT))
def test_a_prompt_equals_that_of_openai_harmony_whichever_effort_the_document_has(
    openai_encoding: HarmonyEncoding, effort: str
) -> None:
    system = (
        SystemContent.new()
        .with_model_identity(CONVERSATION["identity"])
        .with_knowledge_cutoff(CONVERSATION["knowledgeCutoff"])
    )
    system = system.with_conversation_start_date(CONVERSATION["date"]).with_reasoning_effort(EFFORT[effort])
    of_documents = cycle(Renderer(tokenizer(), setting(CONVERSATION | {"effort": own})) for own in EFFORT)
    prompts = PromptBuilder(CONVERSATION | {"effort": "low=0.3,medium=0.3,high=0.4"})
    for renderer, (user, reasoning, answer) in zip(of_documents, texts(), strict=False):
        messages = [
            Message.from_role_and_content(Role.SYSTEM, system),
            Message.from_role_and_content(Role.USER, user),
        ]
        expected = openai_encoding.render_conversation_for_completion(
            Conversation.from_messages(messages), Role.ASSISTANT
        )
        found = prompts.build(*render(renderer, user, reasoning, answer), effort)
        assert found.dtype == np.int32 and found.tolist() == expected


def test_a_documents_own_answer_has_the_datasets_spans_and_is_valid(renderer: Renderer) -> None:
    """A student that samples the dataset's answer: the same ids and spans from the end of the prompt to
    `<|return|>`."""
    for user, reasoning, answer in texts():
        ids, span_T = render(renderer, user, reasoning, answer)
        start = int(np.flatnonzero(span_T)[0]) + 2  # <|start|>assistant is in the prompt
        completion = ids[start:-1]
        assert completion_spans(completion).tolist() == span_T[start:-1].tolist()
        assert completion_validity(completion) == ("valid" if answer and answer.strip() else "noFinal")


def test_a_document_of_another_dataset_is_rejected(renderer: Renderer) -> None:
    ids, span_T = render(renderer, "q", "r", "a")
    with pytest.raises(Permanent, match="does not begin with the system message"):
        PromptBuilder(CONVERSATION | {"effort": "low"}).build(ids, span_T, "high")
    with pytest.raises(Permanent, match="does not begin with the system message"):
        PromptBuilder(CONVERSATION | {"effort": "low=0.5,medium=0.5"}).build(ids, span_T, "high")
    with pytest.raises(ValueError, match="without a supervised token"):
        PromptBuilder(CONVERSATION).build(ids, np.zeros_like(span_T), "high")


@pytest.mark.parametrize(
    "completion, validity, final",
    [
        pytest.param(
            ANALYSIS + ASSISTANT + FINAL_RETURN, "valid", ASSISTANT + FINAL_RETURN, id="reasoning-and-final"
        ),
        pytest.param(FINAL_RETURN, "valid", FINAL_RETURN, id="only-final"),
        pytest.param(
            ANALYSIS + ASSISTANT + ANALYSIS + ASSISTANT + FINAL_RETURN,
            "valid",
            ASSISTANT + FINAL_RETURN,
            id="reasoning-twice",
        ),
        pytest.param(
            "<|channel|>analysis<|message|><|end|>" + ASSISTANT + FINAL_RETURN,
            "valid",
            ASSISTANT + FINAL_RETURN,
            id="empty-reasoning",
        ),
        pytest.param("", "truncated", "", id="empty"),
        pytest.param("<|channel|>analysis<|message|>hm", "truncated", "", id="cut-in-reasoning"),
        pytest.param(ANALYSIS, "truncated", "", id="cut-after-reasoning"),
        pytest.param(ANALYSIS + ASSISTANT, "truncated", "", id="cut-in-a-header"),
        pytest.param(
            ANALYSIS + ASSISTANT + "<|channel|>final",
            "truncated",
            ASSISTANT + "<|channel|>final",
            id="cut-in-a-finals-header",
        ),
        pytest.param(
            ANALYSIS + ASSISTANT + FINAL_END[:-7], "truncated", ASSISTANT + FINAL_END[:-7], id="cut-in-final"
        ),
        pytest.param(FINAL_END, "truncated", FINAL_END, id="cut-after-final"),
        pytest.param(
            "<|channel|>analysis<|message|>hm<|return|>", "unclosedReasoning", "", id="reasoning-returned"
        ),
        pytest.param(
            "<|channel|>analysis<|message|>hm<|call|>", "unclosedReasoning", "", id="reasoning-called"
        ),
        pytest.param(
            "<|channel|>analysis<|message|>hm" + ASSISTANT + FINAL_RETURN,
            "unclosedReasoning",
            "",
            id="reasoning-never-closed",
        ),
        pytest.param(
            ANALYSIS + ASSISTANT + "<|channel|>analysis<|message|>hm<|return|>",
            "unclosedReasoning",
            "",
            id="second-reasoning-returned",
        ),
        pytest.param("<|return|>", "noFinal", "", id="only-return"),
        pytest.param("yes<|return|>", "noFinal", "", id="no-header"),
        pytest.param("<|message|>yes<|return|>", "noFinal", "", id="no-channel"),
        pytest.param("<|channel|>analysis<|return|>", "noFinal", "", id="stopped-in-a-header"),
        pytest.param(
            ANALYSIS + ASSISTANT + "<|channel|>final<|return|>",
            "noFinal",
            ASSISTANT + "<|channel|>final<|return|>",
            id="stopped-in-a-finals-header",
        ),
        pytest.param(
            ANALYSIS + ASSISTANT + "<|channel|>commentary<|message|>yes<|return|>",
            "noFinal",
            "",
            id="commentary",
        ),
        pytest.param("<|channel|>commentary to=f<|message|>{}<|call|>", "noFinal", "", id="a-tool"),
        pytest.param("<|channel|>finally<|message|>yes<|return|>", "noFinal", "", id="another-channel"),
        pytest.param(
            "<|channel|> final<|message|>yes<|return|>", "noFinal", "", id="a-blank-before-the-channel"
        ),
        pytest.param(
            "<|channel|>final<|message|> \n<|return|>",
            "noFinal",
            "<|channel|>final<|message|> \n<|return|>",
            id="blank-final",
        ),
        pytest.param(ANALYSIS + "<|return|>", "noFinal", "", id="returned-after-reasoning"),
        pytest.param(ANALYSIS + FINAL_RETURN, "noFinal", "", id="no-start"),
        pytest.param(
            FINAL_END + ASSISTANT + FINAL_RETURN,
            "wrongOrder",
            FINAL_END + ASSISTANT + FINAL_RETURN,
            id="final-twice",
        ),
        pytest.param(
            FINAL_END + ASSISTANT + ANALYSIS + ASSISTANT + FINAL_RETURN,
            "wrongOrder",
            None,
            id="reasoning-between",
        ),
        pytest.param(
            FINAL_END + ASSISTANT + "<|channel|>analysis<|message|>hm<|return|>",
            "wrongOrder",
            FINAL_END,
            id="final-first",
        ),
        pytest.param(
            FINAL_END[:-7] + "<|call|>", "wrongOrder", FINAL_END[:-7] + "<|call|>", id="final-called"
        ),
        pytest.param(FINAL_END + "<|return|>", "wrongOrder", FINAL_END, id="two-ends"),
        pytest.param(
            FINAL_END + ASSISTANT + "<|return|>", "wrongOrder", FINAL_END, id="returned-in-the-next-header"
        ),
        pytest.param(ASSISTANT + FINAL_RETURN, "noFinal", ASSISTANT + FINAL_RETURN, id="extra-start"),
        pytest.param("assistant" + FINAL_RETURN, "noFinal", "assistant" + FINAL_RETURN, id="role-twice"),
        pytest.param(
            "assistant" + ANALYSIS + ASSISTANT + FINAL_RETURN,
            "noFinal",
            ASSISTANT + FINAL_RETURN,
            id="role-twice-before-reasoning",
        ),
        pytest.param(
            ANALYSIS + ASSISTANT + "assistant" + FINAL_RETURN,
            "noFinal",
            ASSISTANT + "assistant" + FINAL_RETURN,
            id="role-twice-after-reasoning",
        ),
        pytest.param("user" + FINAL_RETURN, "noFinal", "user" + FINAL_RETURN, id="another-role-appended"),
        pytest.param("final" + FINAL_RETURN, "noFinal", "final" + FINAL_RETURN, id="channel-without-marker"),
        pytest.param("s" + FINAL_RETURN, "noFinal", "s" + FINAL_RETURN, id="role-goes-on"),
        pytest.param(" to=user" + FINAL_RETURN, "wrongOrder", " to=user" + FINAL_RETURN, id="recipient"),
        pytest.param(":me" + FINAL_RETURN, "noFinal", ":me" + FINAL_RETURN, id="named-author"),
        pytest.param(" " + FINAL_RETURN, "valid", " " + FINAL_RETURN, id="a-blank-after-the-role"),
        pytest.param(
            ANALYSIS + "<|start|>user<|message|>q<|end|>" + ASSISTANT + FINAL_RETURN,
            "wrongOrder",
            ASSISTANT + FINAL_RETURN,
            id="user-message",
        ),
        pytest.param(
            ANALYSIS + "<|start|>nobody<|message|>q<|end|>" + ASSISTANT + FINAL_RETURN,
            "noFinal",
            ASSISTANT + FINAL_RETURN,
            id="unknown-role",
        ),
        pytest.param(
            "<|channel|>final to=f<|message|>yes<|return|>", "wrongOrder", None, id="final-to-a-tool"
        ),
        pytest.param(
            "<|channel|>final <|constrain|>json<|message|>1<|return|>",
            "wrongOrder",
            None,
            id="final-of-a-type",
        ),
        pytest.param(
            "<|channel|>final<|message|>a<|channel|>b<|start|>c<|return|>",
            "valid",
            None,
            id="specials-in-content",
        ),
        pytest.param(
            "<|channel|>final<|message|>a<|endoftext|>b<|return|>",
            "valid",
            None,
            id="end-of-document-in-content",
        ),
    ],
)
def test_validity_and_spans_of_a_completion(completion: str, validity: str, final: str | None) -> None:
    """`final` is the text with span FINAL, and all other tokens are REASONING. If it is None, all tokens
    outside the reasoning message are FINAL."""
    completion_ids = ids(completion)
    assert completion_validity(completion_ids) == validity
    if final is not None:
        final_ids = ids(final)
        found = completion_ids[completion_spans(completion_ids) == FINAL]
        assert found.tolist() == final_ids.tolist()
    else:
        reasoning = len(ids(ASSISTANT + ANALYSIS)) if ANALYSIS in completion else 0
        assert (completion_spans(completion_ids) == REASONING).sum() == reasoning
    assert completion_spans(completion_ids).dtype == np.uint8 and set(completion_spans(completion_ids)) <= {
        REASONING,
        FINAL,
    }


PIECES = [
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "assistant",
    "analysis",
    "final",
    "commentary",
    "user",
    " to=f",
    "x",
    " ",
    "ly",
]
TOKENS = st.one_of(
    st.sampled_from(PIECES).map(lambda piece: ids(piece).tolist()),
    st.integers(0, 201_087).map(lambda token: [token]),
)
SAMPLED = st.lists(TOKENS, max_size=25).map(
    lambda lists: [token for tokens in lists for token in tokens if token not in STOP_IDS]
)

HARMONY_LIKE = st.lists(
    st.sampled_from(
        [
            *(ids(piece).tolist() for piece in PIECES),
            *(
                ids(part).tolist()
                for part in (ANALYSIS + ASSISTANT, FINAL_RETURN[:-10], FINAL_END, ASSISTANT)
            ),
            *(ids(piece).tolist() for piece in ("<|constrain|>", ":me", "\n", "<|endoftext|>", "tool")),
        ]
    ),
    max_size=6,
).map(lambda lists: [token for tokens in lists for token in tokens])
PROMPT_END = ids(ASSISTANT).tolist()


@settings(
    max_examples=400,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(SAMPLED, st.sampled_from([*STOP_IDS, None]))
@example(ids(ANALYSIS + ASSISTANT + FINAL_RETURN).tolist()[:-1], 200002)
def test_any_completion_has_the_channels_of_openai_harmony(
    openai_encoding: HarmonyEncoding, sampled: list[int], stop: int | None
) -> None:
    """Content tokens have the span of their message's channel, as far as openai-harmony can parse."""
    completion = np.array(sampled if stop is None else [*sampled, stop], np.int32)
    span_T = completion_spans(completion)
    assert len(span_T) == len(completion)
    parser = StreamableParser(openai_encoding, role=None)
    for token in PROMPT_END:
        parser.process(token)
    for token, span in zip(completion.tolist(), span_T.tolist(), strict=True):
        try:
            parser.process(token)
        except HarmonyError:
            break
        if parser.current_channel is not None:
            assert span == (FINAL if parser.current_channel == "final" else REASONING)
    found = completion_validity(completion)
    assert found in VALIDITIES and (found == "truncated") == (stop is None)


@settings(
    max_examples=1500,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(HARMONY_LIKE, st.sampled_from([*STOP_IDS, None]))
@example(ids("assistant" + FINAL_RETURN).tolist()[:-1], 200002)
@example(ids(" " + FINAL_RETURN).tolist()[:-1], 200002)
def test_a_completion_is_valid_if_openai_harmony_parses_it_and_our_stricter_rules_hold(
    openai_encoding: HarmonyEncoding, sampled: list[int], stop: int | None
) -> None:
    """openai-harmony parses the completion as it was sampled, from `<|start|>assistant` on. Stricter than it
    are: the end with `<|return|>`, the order, a final message with text, and no name, recipient or type."""
    completion = [*sampled, *([] if stop is None else [stop])]
    try:
        messages = openai_encoding.parse_messages_from_completion_tokens([*PROMPT_END, *completion], None)
    except HarmonyError:
        messages = []
    channels = [message.channel for message in messages]
    valid = (
        bool(messages)
        and stop == RETURN
        and channels == ["analysis"] * (len(messages) - 1) + ["final"]
        and messages[-1].content[0].text.strip() != ""
        and all(m.author.role == Role.ASSISTANT and m.author.name is None for m in messages)
        and all(m.recipient is None and m.content_type is None for m in messages)
    )
    ids_T = np.array(completion, np.int32)
    assert (completion_validity(ids_T) == "valid") == valid
    assert not valid or (completion_spans(ids_T) == FINAL).any()
