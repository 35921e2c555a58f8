"""Conversations of a chat client, and the same in openai-harmony."""

from collections.abc import Mapping, Sequence
from typing import Any

from openai_harmony import (
    Conversation,
    DeveloperContent,
    HarmonyEncoding,
    Message,
    ReasoningEffort,
    RenderConversationConfig,
    Role,
    SystemContent,
)

from vpmoe.data.harmony import SystemMessage

SYSTEM = SystemMessage("You are vpMoE, a large language model.", "2024-06", "2026-01-01", "high")
EFFORT = {"low": ReasoningEffort.LOW, "medium": ReasoningEffort.MEDIUM, "high": ReasoningEffort.HIGH}

Messages = Sequence[Mapping[str, str | None]]
"""With the fields `role`, `content` and, for answers, `reasoning_content`."""


def harmony_ids(
    encoding: HarmonyEncoding, messages: Messages, *, system: SystemMessage = SYSTEM, answer: bool = True
) -> list[int]:
    """openai-harmony's ids. All reasoning is rendered. `answer`: the prompt of an answer; otherwise the
    conversation ends with one, and the ids are those of training."""
    content = (
        SystemContent.new()
        .with_model_identity(system.identity)
        .with_knowledge_cutoff(system.knowledge_cutoff)
        .with_reasoning_effort(EFFORT[system.effort])
    )
    if system.date is not None:
        content = content.with_conversation_start_date(system.date)
    rendered = [Message.from_role_and_content(Role.SYSTEM, content)]
    for message in messages:
        rendered += _messages(message)
    conversation = Conversation.from_messages(rendered)
    config = RenderConversationConfig(auto_drop_analysis=False)
    if answer:
        return encoding.render_conversation_for_completion(conversation, Role.ASSISTANT, config=config)
    return encoding.render_conversation_for_training(conversation, config=config)


def _messages(message: Mapping[str, Any]) -> list[Message]:
    if message["role"] in ("system", "developer"):
        instructions = DeveloperContent.new().with_instructions(message["content"])
        return [Message.from_role_and_content(Role.DEVELOPER, instructions)]
    if message["role"] == "user":
        return [Message.from_role_and_content(Role.USER, message["content"])]
    said = {"analysis": message.get("reasoning_content"), "final": message["content"]}
    return [
        Message.from_role_and_content(Role.ASSISTANT, text).with_channel(channel)
        for channel, text in said.items()
        if text is not None
    ]
