"""The fields of an answer, and a conversation with a sentinel in each: a text or number that stands nowhere else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_sft.types import Conversation

Message = Mapping[str, Any]
Leaf = str | int | float | bool | None

MARKUP = re.compile(r"(?i)</?(think|thought|reason|answer|tool|arg_|function|param|call)\w*>|\[/?THINK\]")
"""Tags that a text may have as the tokens that they are: they begin and end no turn."""


def texts_of(content: str) -> list[str]:
    """The parts of a text between tags of thoughts, which a template may write in another way."""
    parts, last = [], 0
    for tag in MARKUP.finditer(content):
        parts.append(content[last : tag.start()])
        last = tag.end()
    return [part for part in [*parts, content[last:]] if part.strip()]


def fields_of(message: Message) -> Iterator[Leaf]:
    """Everything that an answer says: its reasoning, its text, and of each call the name and all of its arguments."""
    for key in ("reasoning_content", "content"):
        yield from texts_of(message.get(key) or "")
    for call in message.get("tool_calls") or ():
        arguments = call["function"].get("arguments")
        yield call["function"]["name"]
        yield from _leaves(json.loads(arguments) if isinstance(arguments, str) else arguments)


def _leaves(value: Any) -> Iterator[Leaf]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def spellings(value: Leaf) -> list[str]:
    """The ways in which a template may write a value."""
    if isinstance(value, str):
        ways = [value, json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1], repr(value)[1:-1]]
        ways.append(value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n"))  # a text of Python
        ways += [json.dumps(way, ensure_ascii=False)[1:-1] for way in ways[1:3]]  # JSON in JSON
        return list(dict.fromkeys([*ways, value.strip()]))
    return list(dict.fromkeys([json.dumps(value), str(value)]))


def missing(values: Sequence[Leaf], text: str) -> list[Leaf]:
    """Those of the values that a text does not have, each in a place of its own."""
    lost: list[Leaf] = []
    text = text.replace("▁", " ")  # decoders of SentencePiece write it as a blank
    for value in sorted(values, key=lambda own: -len(str(own))):
        for way in (way.replace("▁", " ") for way in spellings(value)):
            if way and way in text:
                text = text.replace(way, "\x00", 1)
                break
        else:
            if str(value).strip():
                lost.append(value)
    return lost


@dataclass
class Marked:
    """A conversation with sentinels, and those of each answer by the number of its turn."""

    conversation: Conversation
    sentinels: dict[int, list[Leaf]] = field(default_factory=dict)


def marked(conversation: Conversation, hidden: re.Pattern[str]) -> Marked:
    """The conversation with a sentinel in each field of each answer, and tools and results named to match.

    Args:
        conversation: The conversation.
        hidden: Matches control tokens; what has one in it gets a sentinel without.
    """
    maker = _Maker(hidden)
    messages, sentinels = [], {}
    for turn, message in enumerate(conversation.messages):
        if message["role"] == "assistant":
            message = maker.answer(message)
            sentinels[turn] = [value for value in fields_of(message) if maker.is_sentinel(value)]
        messages.append(message)
    messages = [
        {**message, "name": maker.names[message["name"]]} if message.get("name") in maker.names else message
        for message in messages
    ]
    tools = [maker.tool(tool) for tool in conversation.tools] if conversation.tools else conversation.tools
    return Marked(replace(conversation, messages=messages, tools=tools), sentinels)


class _Maker:
    def __init__(self, hidden: re.Pattern[str]) -> None:
        self.hidden, self.number = hidden, 0
        self.names: dict[str, str] = {}
        self.keys: dict[str, str] = {}

    def is_sentinel(self, value: Leaf) -> bool:
        return not (value is None or isinstance(value, bool)) and ("zqv" in str(value) or "7913" in str(value))

    def answer(self, message: Message) -> dict[str, Any]:
        made = dict(message)
        for key in ("reasoning_content", "content"):
            if made.get(key):
                made[key] = self._text(made[key])
        if made.get("tool_calls"):
            made["tool_calls"] = [{**call, "function": self._function(call["function"])} for call in made["tool_calls"]]
        return made

    def tool(self, tool: Any) -> Any:
        function = tool["function"]
        parameters = dict(function.get("parameters") or {})
        if "properties" in parameters:
            parameters["properties"] = {
                self.keys.get(key, key): value for key, value in parameters["properties"].items()
            }
        if "required" in parameters:
            parameters["required"] = [self.keys.get(key, key) for key in parameters["required"]]
        name = self.names.get(function["name"], function["name"])
        return {**tool, "function": {**function, "name": name, "parameters": parameters}}

    def _function(self, function: Mapping[str, Any]) -> dict[str, Any]:
        name = self.names.setdefault(function["name"], self._new())
        return {**function, "name": name, "arguments": self._value(function["arguments"])}

    def _value(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {self.keys.setdefault(str(key), self._new()): self._value(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._value(inner) for inner in value]
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, (int, float)):
            self.number += 1
            return type(value)(7_913_000 + self.number) + (0.5 if isinstance(value, float) else 0)
        return self._text(value) if value else value

    def _text(self, text: str) -> str:
        """The same text with a sentinel for each part of it; blanks around it and tags of thoughts stay."""
        for part in texts_of(text):
            text = text.replace(part.strip(), self._new(), 1)
        return text

    def _new(self) -> str:
        self.number += 1
        return f"zqv{self.number}vqz"
