"""Prompts equal openai-harmony's, and answers are what openai-harmony reads in a completion."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_harmony import HarmonyEncoding, Role

from tests.fakes.completions import ANALYSIS, ASSISTANT, FINAL_END, FINAL_RETURN, ids
from tests.fakes.conversations import SYSTEM, harmony_ids
from vpmoe.data.vocabulary import STOP_IDS
from vpmoe.task_evaluation.answers import prompt, read_answer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(question=TEXTS)
@settings(max_examples=30)
def test_a_prompt_is_that_of_openai_harmony(harmony: HarmonyEncoding, question: str) -> None:
    expected = harmony_ids(harmony, [{"role": "user", "content": question}])
    assert prompt(SYSTEM, question).tolist() == expected


@pytest.mark.parametrize(
    "completion, text, validity, reasoning",
    [
        pytest.param(ANALYSIS + ASSISTANT + FINAL_RETURN, "yes", "valid", len(ids(ANALYSIS))),
        pytest.param(FINAL_RETURN, "yes", "valid", 0, id="no reasoning"),
        pytest.param(ANALYSIS + ASSISTANT + FINAL_RETURN[:-10], "", "truncated", None, id="cut off"),
        pytest.param("", "", "truncated", 0, id="no room for an answer"),
        pytest.param(ANALYSIS[:-7] + "<|return|>", "", "unclosedReasoning", None, id="only reasoning"),
        pytest.param(ANALYSIS.replace("analysis", "commentary")[:-7] + "<|call|>", "", "noFinal", None),
        pytest.param(FINAL_END + ASSISTANT + ANALYSIS[:-7] + "<|return|>", "yes", "wrongOrder", None),
    ],
)
def test_only_a_final_message_of_a_completion_that_ended_is_an_answer(
    completion: str, text: str, validity: str, reasoning: int | None
) -> None:
    found = read_answer(ids(completion))
    assert (found.text, found.validity) == (text, validity)
    assert found.cut_off == (validity == "truncated")
    assert found.reasoning_tokens + found.final_tokens == len(ids(completion))
    if reasoning is not None:
        assert found.reasoning_tokens == reasoning


@given(reasoning=TEXTS.filter(str.strip), answer=TEXTS.filter(str.strip))
@settings(max_examples=40)
def test_a_valid_answer_is_the_text_that_openai_harmony_reads(
    harmony: HarmonyEncoding, reasoning: str, answer: str
) -> None:
    completion = [
        *ids("<|channel|>analysis<|message|>"), *harmony.encode(reasoning), *ids("<|end|>" + ASSISTANT),
        *ids("<|channel|>final<|message|>"), *harmony.encode(answer), *ids("<|return|>"),
    ]  # fmt: skip
    found = read_answer(np.array(completion, np.int32))
    messages = harmony.parse_messages_from_completion_tokens(completion, Role.ASSISTANT)
    assert found.text == messages[-1].content[0].text.strip() and found.validity == "valid"
    assert found.final_tokens == (
        len(ids(ASSISTANT + "<|channel|>final<|message|>")) + len(harmony.encode(answer)) + 1
    )


@given(
    completion=st.lists(st.sampled_from([*ids(ANALYSIS + ASSISTANT + FINAL_RETURN).tolist(), 11, *STOP_IDS]))
)
@settings(max_examples=200)
def test_any_tokens_have_an_answer_and_are_counted_once(completion: list[int]) -> None:
    found = read_answer(np.array(completion, np.int32))
    assert found.reasoning_tokens + found.final_tokens == len(completion)
    ended = bool(completion) and completion[-1] in STOP_IDS
    assert found.cut_off == (not ended)
    assert ended or not found.text
