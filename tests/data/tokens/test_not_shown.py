"""What a chat template does not show before an answer is said, whatever else stands in its text."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_sft.data.tokens.encode import encode_all
from lightning_sft.data.tokens.not_shown import CALLS_NOT_SHOWN, SYSTEM_NOT_SHOWN, TOOLS_NOT_SHOWN
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.types import Conversation, Message

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = f"{HEAD}{{{{ m.content }}}}{TAIL}"
WITHOUT_SYSTEM = PLAIN.replace("in messages", "in messages if m.role != 'system'")
LOWER = PLAIN.replace("{{ m.content }}", "{{ m.content if m.role == 'assistant' else m.content | lower }}")
TOOLS = "{% for tool in tools or [] %}{{ tool.function.name | upper }}\n{% endfor %}"
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
WITH_CALLS = PLAIN.replace("{{ m.content }}", "{{ m.content }}" + CALLS)
LONG = "It answers with the temperature of the place."


def tool(name: str, description: str = "d") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": {}}}


def notes(template: str, *messages: Message, tools: Any = None, weights: Any = None) -> set[str]:
    given = Conversation(list(messages), tools, weights=weights or [0.0] * (len(messages) - 1) + [1.0])
    [encoded] = encode_all([given], tiny_tokenizer(template))
    assert encoded.refusal is None
    return encoded.notes


def said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


@pytest.mark.parametrize("name", ["weather", "m", "im_start", "Rome"])
@pytest.mark.parametrize("description", ["d", LONG])
def test_a_tool_whose_name_stands_in_other_texts_is_not_shown_by_that(name: str, description: str) -> None:
    turns = said("user", f"What is the weather in Rome? {LONG}"), said("assistant", "I do not know.")
    tools = [tool(name, description)]
    assert notes(PLAIN, *turns, tools=tools) == {TOOLS_NOT_SHOWN}
    assert notes(TOOLS + PLAIN, *turns, tools=tools) == set()


def test_each_tool_has_to_be_shown() -> None:
    turns = said("user", "look up or search"), said("assistant", "Yes.")
    tools = [tool("look"), tool("search")]
    assert notes(TOOLS + PLAIN, *turns, tools=tools) == set()
    assert notes(TOOLS.replace("tools or []", "tools[:1]") + PLAIN, *turns, tools=tools) == {TOOLS_NOT_SHOWN}


@pytest.mark.parametrize("system", ["You", "S", "be", "user", "Be kind.", LONG])
def test_a_system_turn_that_stands_in_other_texts_is_not_shown_by_that(system: str) -> None:
    turns = said("system", system), said("user", f"You be kind. Be kind. {LONG} S"), said("assistant", "Yes.")
    assert notes(WITHOUT_SYSTEM, *turns) == {SYSTEM_NOT_SHOWN}
    for template in (PLAIN, LOWER):
        assert notes(template, *turns) == set()


def test_a_system_turn_that_is_cut_off_is_said() -> None:
    turns = said("system", LONG), said("user", "u"), said("assistant", "Yes.")
    assert notes(PLAIN.replace("{{ m.content }}", "{{ m.content[:10] }}"), *turns) == {SYSTEM_NOT_SHOWN}


CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}],
}


@pytest.mark.parametrize("result", ["21", LONG])
def test_a_call_of_the_context_that_is_dropped_is_said(result: str) -> None:
    turns = said("user", "The weather of the city Rome?"), CALL, said("tool", result), said("assistant", f"21. {LONG}")
    assert notes(PLAIN, *turns) == {CALLS_NOT_SHOWN}
    assert notes(WITH_CALLS, *turns) == set()
    nameless = WITH_CALLS.replace("{{ c.function.name }}", "")
    without_results = WITH_CALLS.replace("in messages", "in messages if m.role != 'tool'")
    for template in (nameless, without_results):
        assert notes(template, *turns) == {CALLS_NOT_SHOWN}


def test_a_call_that_is_trained_is_in_the_text() -> None:
    turns = said("user", "u"), CALL, said("tool", "21"), said("assistant", "21.")
    assert notes(WITH_CALLS, *turns, weights=[0.0, 1.0, 0.0, 1.0]) == set()


def test_a_template_that_refuses_other_texts_is_asked_for_these() -> None:
    picky = "{% if messages[0].content not in ('Be kind.', 'S') %}{{ raise_exception('no') }}{% endif %}"
    for system, found in (("S", set()), ("Be kind.", {SYSTEM_NOT_SHOWN})):
        turns = said("system", system), said("user", "You? S"), said("assistant", "Yes.")
        assert notes(picky + WITHOUT_SYSTEM, *turns) == found


def test_a_system_turn_that_begins_the_turn_of_the_user_is_shown() -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TOOLS + PLAIN
    turns = said("system", "S"), said("user", "You? S"), said("assistant", "Yes.")
    merged = "the chat template refuses system turns, so theirs begins the user's turn"
    for weights in ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0]):
        assert notes(refuses, *turns, tools=[tool("f")], weights=weights) - {LEFT} == {merged}


LEFT = "turns after the last that is trained are left out, they are of the role user, assistant"
