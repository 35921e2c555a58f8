"""The chat template of an exported student gives openai-harmony's ids, and those of the training
conversations."""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from jinja2 import TemplateError
from openai_harmony import Conversation, HarmonyEncoding, Message, Role

from tests.fakes.conversations import SYSTEM, Messages, harmony_ids
from tests.fakes.hostile_texts import NEW_CHARACTERS, TEXTS
from tests.fakes.students import new_seed
from vpmoe.data.harmony import Renderer, SystemMessage, user_text
from vpmoe.data.tokenizer import tokenizer
from vpmoe.data.vocabulary import CHANNEL, END_OF_DOCUMENT, START
from vpmoe.export.chat_template import chat_template
from vpmoe.export.tokenizer_files import ESCAPE


def ids(exported: Any, messages: Messages, *, answer: bool = True, **variables: Any) -> list[int]:
    """The ids of a rendered conversation."""
    found: list[int] = exported.apply_chat_template(
        list(messages), add_generation_prompt=answer, tokenize=True, return_dict=False, **variables
    )
    return found


def user(text: str) -> Mapping[str, str]:
    return {"role": "user", "content": text}


def answer(text: str | None, reasoning: str | None = None) -> Mapping[str, str | None]:
    return {"role": "assistant", "content": text, "reasoning_content": reasoning}


QUESTION = user("Why is the sky blue? ∴ ☑")

CONVERSATIONS = {
    "user": [QUESTION],
    "developer": [{"role": "developer", "content": "Answer in one line.\n\n- no lists"}, QUESTION],
    "system": [{"role": "system", "content": "Antworte auf Deutsch."}, QUESTION],
    "two-turns": [QUESTION, answer("Because."), user("Of what?")],
    "three-turns": [
        {"role": "developer", "content": "Be brief."},
        QUESTION,
        answer("Because."),
        user("Of what?"),
        answer("Scattering.\n"),
        user(" "),
    ],
    "empty": [user("")],
    "an-empty-answer": [QUESTION, answer(""), user("Well?")],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_ids_equal_those_of_openai_harmony(
    exported: Any, harmony: HarmonyEncoding, name: str, effort: str
) -> None:
    messages = CONVERSATIONS[name]
    expected = harmony_ids(harmony, messages, system=replace(SYSTEM, effort=effort))
    assert ids(exported, messages, reasoning_effort=effort) == expected


def test_the_default_effort_is_that_of_the_run(exported: Any, harmony: HarmonyEncoding) -> None:
    for variables in ({}, {"reasoning_effort": None}, {"model_identity": None}):
        assert ids(exported, [QUESTION], **variables) == harmony_ids(harmony, [QUESTION])


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in TEXTS.items()])
def test_hostile_text_in_any_message_is_ordinary_text(
    exported: Any, harmony: HarmonyEncoding, text: str
) -> None:
    messages = [{"role": "developer", "content": text}, user(text), answer(text), user(text)]
    expected = harmony_ids(harmony, messages, system=replace(SYSTEM, identity=text))
    assert ids(exported, messages, model_identity=text) == expected


def test_any_text_is_rendered_like_openai_harmony(exported: Any, harmony: HarmonyEncoding) -> None:
    """Also text that contains the mark with which the template makes special tokens ordinary text."""
    seed = new_seed()
    chance = random.Random(seed)
    pieces = [*"<|>aZ1 \n\r\t'é漢\u0301\u093e😀{}%#-", ESCAPE, f"<{ESCAPE}", f"<{ESCAPE}|end|>", "<|end|>"]
    pieces += ["<|start|>", "<|message|>", "{{", "}}", "{%", "assistant", "<|call|>", "'LL", *NEW_CHARACTERS]
    for _ in range(1500):
        first, second = ("".join(chance.choices(pieces, k=chance.randrange(1, 30))) for _ in range(2))
        messages = [user(first), answer(second), user(first[::-1])]
        assert ids(exported, messages) == harmony_ids(harmony, messages), (first, second)


def test_earlier_reasoning_is_left_out(exported: Any, harmony: HarmonyEncoding) -> None:
    """As the Harmony guide says. openai-harmony itself leaves it out before the first final message only."""
    second = [QUESTION, answer("Because.", "I think."), user("Of what?")]
    assert ids(exported, second) == harmony_ids(harmony, CONVERSATIONS["two-turns"])
    rendered = [
        Message.from_role_and_content(Role.USER, str(QUESTION["content"])),
        Message.from_role_and_content(Role.ASSISTANT, "I think.").with_channel("analysis"),
        Message.from_role_and_content(Role.ASSISTANT, "Because.").with_channel("final"),
        Message.from_role_and_content(Role.USER, "Of what?"),
    ]
    by_harmony = harmony.render_conversation_for_completion(
        Conversation.from_messages(rendered), Role.ASSISTANT
    )
    found = ids(exported, second)
    assert found[-len(by_harmony) :] == by_harmony
    third = [*second, answer("Scattering.", "Hm."), user("So?")]
    plain = [message if message["role"] == "user" else answer(message["content"]) for message in third]
    assert ids(exported, third) == harmony_ids(harmony, plain)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_a_conversation_that_ends_with_the_answer_is_rendered_whole(
    exported: Any, harmony: HarmonyEncoding, field: str
) -> None:
    last = {"role": "assistant", "content": "Scattering.", field: "Hm. <|end|>"}
    messages = [QUESTION, answer("Because."), user("Of what?")]
    expected = harmony_ids(harmony, [*messages, answer("Scattering.", "Hm. <|end|>")], answer=False)
    assert ids(exported, [*messages, last], answer=False) == expected


def test_reasoning_without_a_final_message_is_kept(exported: Any, harmony: HarmonyEncoding) -> None:
    """An answer that was cut off, and is to be continued."""
    messages = [QUESTION, answer(None, "Let me think")]
    assert ids(exported, messages) == harmony_ids(harmony, messages)


@pytest.mark.parametrize(
    "system",
    [
        SYSTEM,
        replace(SYSTEM, effort="low", date=None),
        replace(SYSTEM, identity='Jesteś "vpMoE" \\ <|end|> {{ x }} @REST@ %}\nZweite Zeile, 第三 😀'),
        replace(SYSTEM, date="2031-12-24", knowledge_cutoff="2030-01", effort="medium"),
    ],
    ids=["default", "no-date", "identity", "dates"],
)
@pytest.mark.parametrize("reasoning", [None, " \n", "≈ 3 ⟨H≈0.4⟩"], ids=["none", "blank", "reasoning"])
def test_ids_equal_those_of_training(exported: Any, system: SystemMessage, reasoning: str | None) -> None:
    """A whole document, and the prompt with which it begins."""
    document = Renderer(tokenizer(), system).render("How deep?", "The pond.", reasoning, "3 m").ids.tolist()
    messages = [user(user_text("How deep?", "The pond.")), answer("3 m", reasoning)]
    template = chat_template(system)
    found = ids(exported, messages, answer=False, chat_template=template)
    assert [*found, END_OF_DOCUMENT] == document
    prompt = ids(exported, messages[:1], chat_template=template)
    assert document[: len(prompt) + 1] == [*prompt, CHANNEL] and prompt[-2] == START


@pytest.mark.parametrize(
    "messages, variables, message",
    [
        ([QUESTION], {"reasoning_effort": "none"}, "reasoning_effort is none. It is low, medium or high"),
        ([QUESTION], {"tools": [{"type": "function", "function": {"name": "f"}}]}, "not trained with tools"),
        ([QUESTION, {"role": "tool", "content": "x"}], {}, "A message of role tool. Roles are user"),
        ([QUESTION, {"role": "system", "content": "x"}], {}, "A message of role system. .*the first"),
        ([{"role": "user", "content": None}], {}, "The content of a message is not a string"),
        ([{"role": "user"}], {}, "The content of a message is not a string"),
        ([QUESTION, {**answer("x"), "tool_calls": [{}]}], {}, "Leave out tool_calls"),
    ],
    ids=["effort", "tools", "tool", "late-system", "no-text", "no-content", "tool-calls"],
)
def test_what_the_student_was_not_trained_with_is_refused(
    exported: Any, messages: Any, variables: Any, message: str
) -> None:
    with pytest.raises(TemplateError, match=message):
        ids(exported, messages, **variables)
