"""Marks around the texts of turns, by which their places are found in a render that is the same without them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning_sft.types import Message

MARK = "Xq{:05d}{}qX"
"""Of a turn, by its number: b where its text begins, e where it ends, i within."""

MARKS = re.compile(r"Xq(\d{5})([bei])qX")


def with_marks(message: Message, turn: int, first: int, last: int) -> Message:
    """A message with marks around a text of it; of an answer, behind each of its texts."""
    if message["role"] == "assistant":
        made = {**message}
        for key in ("reasoning_content", "content"):
            if (message.get(key) or "").strip():
                made[key] = _ended(message[key], turn)
        if message.get("tool_calls"):
            made["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _ended_in(call["function"]["arguments"], turn)}}
                if isinstance(call["function"].get("arguments"), Mapping)
                else call
                for call in message["tool_calls"]
            ]
        return made
    content = message.get("content") or ""
    core = content[first:last].strip()
    begin = content.index(core, first)
    end = begin + len(core)
    marked = f"{content[:begin]}{MARK.format(turn, 'b')}{core}{MARK.format(turn, 'e')}{content[end:]}"
    return {**message, "content": marked}


def _ended(text: str, turn: int) -> str:
    """A text with a mark at its end, before the space there."""
    end = len(text.rstrip())
    return f"{text[:end]}{MARK.format(turn, 'e')}{text[end:]}"


def _ended_in(value: Any, turn: int) -> Any:
    """Arguments with a mark at the end of each text."""
    if isinstance(value, Mapping):
        return {key: _ended_in(inner, turn) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_ended_in(inner, turn) for inner in value]
    return _ended(value, turn) if isinstance(value, str) and value.strip() else value
