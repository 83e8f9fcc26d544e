"""Conversations, and the same as rows of five dialects."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from lightning_sft.types import Conversation

Message = Mapping[str, Any]

_QUESTIONS = (
    "What is the capital of {place}?",
    "Translate into {language}:\n\ngood morning",
    "Write a function that adds {number} to each element of a list.",
    "Summarize the history of {place} in {number} words, please.",
    "¿Cuántos habitantes tiene {place}?",
    "List {number} facts about {place}:\n- short\n- checked",
)
_ANSWERS = (
    "It is {place}.",
    "Guten Morgen 👋",
    "```python\ndef add(values):\n    return [value + {number} for value in values]\n```",
    "1. {place} is old.\n2. {place} is large.\n\nIs there anything else?",
    "{place} tiene {number} millones.\n",
    " {number}",
)
_THOUGHTS = ("The user asks about {place}.", "Let me count.\n\n{number}, so it is clear.")
_SYSTEMS = ("You are a helpful assistant.", "Answer in {language}.")
_FILL = {"place": ("Chile", "Japan", "Köln", "Mali"), "language": ("German", "हिन्दी"), "number": ("3", "17", "250")}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "Its name"}},
            "required": ["place"],
        },
    },
}


class _Writer:
    """Makes conversations from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)

    def text(self, *patterns: str) -> str:
        chosen = self.random.choice(patterns)
        return chosen.format(**{key: self.random.choice(values) for key, values in _FILL.items()})

    def turns(self, num_answers: int, *, thinks: bool = False, system: bool = False) -> list[Message]:
        found = [{"role": "system", "content": self.text(*_SYSTEMS)}] if system else []
        for _ in range(num_answers):
            thought = f"<think>\n{self.text(*_THOUGHTS)}\n</think>\n\n" if thinks else ""
            found += [
                {"role": "user", "content": self.text(*_QUESTIONS)},
                {"role": "assistant", "content": thought + self.text(*_ANSWERS)},
            ]
        return found

    def single(self) -> Conversation:
        return Conversation(self.turns(1))

    def several(self) -> Conversation:
        return Conversation(self.turns(self.random.randint(1, 3), system=self.random.random() < 0.5))

    def thinking(self) -> Conversation:
        return Conversation(self.turns(self.random.randint(1, 2), thinks=True, system=self.random.random() < 0.3))

    def calling(self) -> Conversation:
        place = self.text("{place}")
        call = {
            "type": "function",
            "id": "call00001",
            "function": {"name": "get_weather", "arguments": {"place": place}},
        }
        found: list[Message] = [
            {"role": "user", "content": f"How is the weather in {place}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": self.text("{number} °C")},
            {"role": "assistant", "content": self.text(*_ANSWERS)},
        ]
        if self.random.random() < 0.3:
            found += self.turns(1)
        return Conversation(found, tools=[WEATHER])


def _pair(conversation: Conversation, keys: tuple[str, str]) -> dict[str, Any]:
    return dict(zip(keys, (message["content"] for message in conversation.messages), strict=True))


def _alpaca(conversation: Conversation) -> dict[str, Any]:
    return _pair(conversation, ("instruction", "output")) | {"input": ""}


def _prompt_completion(conversation: Conversation) -> dict[str, Any]:
    return _pair(conversation, ("prompt", "completion"))


def _sharegpt(conversation: Conversation) -> dict[str, Any]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in conversation.messages]}


def _messages(conversation: Conversation) -> dict[str, Any]:
    return {"messages": [dict(message) for message in conversation.messages]}


def _tools(conversation: Conversation) -> dict[str, Any]:
    return _messages(conversation) | {"tools": conversation.tools}


DIALECTS: dict[str, tuple[Callable[[_Writer], Conversation], Callable[[Conversation], dict[str, Any]]]] = {
    "alpaca": (_Writer.single, _alpaca),
    "prompt_completion": (_Writer.single, _prompt_completion),
    "sharegpt": (_Writer.several, _sharegpt),
    "messages": (_Writer.thinking, _messages),
    "tools": (_Writer.calling, _tools),
}
"""Name -> what makes a conversation, and what writes it as a row.

``alpaca`` and ``prompt_completion`` have one answer; ``sharegpt`` up to three, half of them with a system turn; answers
of ``messages`` begin with a thought; ``tools`` have a call, its result, and answers.
"""


def conversations(dialect: str, count: int, seed: int) -> list[Conversation]:
    """The conversations of a dialect, the same for a seed."""
    writer = _Writer(seed * 100 + list(DIALECTS).index(dialect))
    return [DIALECTS[dialect][0](writer) for _ in range(count)]


def lines(dialect: str, found: list[Conversation]) -> str:
    """Conversations as JSONL."""
    return "".join(json.dumps(DIALECTS[dialect][1](c), ensure_ascii=False) + "\n" for c in found)
