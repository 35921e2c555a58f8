"""The chat template: renders a conversation in Harmony, as the student's training conversations are.

Same roles, fields and variables as GPT-OSS' own template. A `system` or `developer` message becomes the
instructions of Harmony's developer message, because Harmony's system message is written by the template. Of
earlier answers only the final messages are rendered, as the Harmony guide says, unless the conversation ends
with the answer (training on it): that one is rendered whole. Tools are refused: the student was not trained
with them.
"""

import json
import re
from dataclasses import replace

from vpmoe.data.harmony import SystemMessage, system_text
from vpmoe.export.tokenizer_files import ESCAPE

TEMPLATE = r"""
{#- A conversation in Harmony. Variables: reasoning_effort (low, medium or high) and model_identity. -#}
{%- set identity = model_identity or @IDENTITY@ %}
{%- set effort = reasoning_effort or @EFFORT@ %}
{%- macro plain(text) %}
    {%- if text is not string %}
        {{- raise_exception("The content of a message is not a string.") }}
    {%- endif %}
    {#- Special tokens in a message are ordinary text: the tokenizer removes the mark again. #}
    {{- text | replace("<@ESCAPE@", "<@ESCAPE@@ESCAPE@") | replace("<|", "<@ESCAPE@|") }}
{%- endmacro %}
{%- if effort not in ["low", "medium", "high"] %}
    {{- raise_exception("reasoning_effort is " ~ effort ~ ". It is low, medium or high.") }}
{%- endif %}
{%- if tools %}
    {{- raise_exception("This model was not trained with tools. Leave them out.") }}
{%- endif %}
{{- "<|start|>system<|message|>" ~ plain(identity) ~ @MIDDLE@ ~ effort ~ @REST@ ~ "<|end|>" }}
{%- for message in messages %}
    {%- set thought = message.reasoning_content or message.reasoning or message.thinking or "" %}
    {%- set answered = message.content is not none and message.content is defined %}
    {%- set whole = loop.last and not add_generation_prompt %}
    {%- if message.role in ["system", "developer"] and loop.first %}
        {{- "<|start|>developer<|message|># Instructions\n\n" ~ plain(message.content) ~ "<|end|>" }}
    {%- elif message.role == "user" %}
        {{- "<|start|>user<|message|>" ~ plain(message.content) ~ "<|end|>" }}
    {%- elif message.role == "assistant" %}
        {%- if message.tool_calls %}
            {{- raise_exception("This model was not trained with tools. Leave out tool_calls.") }}
        {%- endif %}
        {%- if thought | trim and (whole or not answered) %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" ~ plain(thought) ~ "<|end|>" }}
        {%- endif %}
        {%- if answered %}
            {{- "<|start|>assistant<|channel|>final<|message|>" ~ plain(message.content) }}
            {{- "<|return|>" if whole else "<|end|>" }}
        {%- endif %}
    {%- else %}
        {{- raise_exception("A message of role " ~ message.role ~ ". Roles are user and assistant; the first "
            ~ "message may be of role system or developer.") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start|>assistant" }}
{%- endif %}
"""
"""In Jinja. The words between @ are replaced."""


def chat_template(system: SystemMessage) -> str:
    """The content of chat_template.jinja. `system`: the system message of conversations that do not override
    it."""
    around = system_text(replace(system, identity="@IDENTITY@", effort="@EFFORT@"))
    middle, rest = around.removeprefix("@IDENTITY@").split("@EFFORT@")
    values = {
        "IDENTITY": _literal(system.identity),
        "EFFORT": _literal(system.effort),
        "MIDDLE": _literal(middle),
        "REST": _literal(rest),
        "ESCAPE": f"\\u{ord(ESCAPE):04x}",
    }
    return re.sub("@([A-Z]+)@", lambda word: values[word[1]], TEMPLATE.strip())


def _literal(text: str) -> str:
    """A string in Jinja's syntax."""
    return json.dumps(text, ensure_ascii=False)
