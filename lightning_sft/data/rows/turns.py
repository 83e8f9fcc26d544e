"""One message of a conversation to its normal form, whatever the format that it came in.

``{"role": "system" | "user" | "assistant" | "tool", "content": str}``, and for an assistant ``reasoning_content`` and
``tool_calls``, for a tool ``name`` and ``tool_call_id``. Keys that say nothing to a model are ignored and counted, any
other that has no place here is an error; null is no value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_sft.data.rows.calls import read_call, read_result
from lightning_sft.data.rows.dialects import CALLERS, COMMON, Dialect
from lightning_sft.data.rows.values import decoded, shown, text_of, weight_of
from lightning_sft.types import InputError, Message

Turn = tuple[Message, float | None]
"""A message in its normal form, and the weight that its flags give it, or ``None`` where it has no flags."""

_PARTS = {"reasoning": 0, "thinking": 0, "text": 1, "tool_call": 2, "tool_use": 2}  # as templates order them
_TEXTS = ("input_text", "output_text")  # of OpenAI's responses
_NOTHING = frozenset({"annotations", "cache_control", "citations", "id", "index", "is_error", "logprobs", "signature"})
_ROLES = ("user", "assistant", "system")
_EMPTY: tuple[Any, ...] = ("", [], {})


def read_turns(given: Any, dialect: Dialect = COMMON, ignored: set[str] | None = None) -> list[Turn]:
    """A message in its normal form: one turn, or more where a user's message carries results of tools.

    Args:
        given: The message.
        dialect: Names of roles and keys beside the common ones.
        ignored: Takes in the keys that say nothing, ``messages[].timestamp``.

    Raises:
        InputError: When it has no role, no text, a key without a meaning, or a value that is not of its kind.

    >>> read_turns({"from": "gpt", "value": "Hello", "weight": 0.5})
    [({'role': 'assistant', 'content': 'Hello'}, 0.5)]
    """
    if dialect is COMMON and (plain := _plain(given)):
        return [(plain, None)]
    ignored = set() if ignored is None else ignored
    names = dialect.names
    if not isinstance(given, Mapping) or not any(name in given for name in names["role"]):
        raise InputError(f"expected {{'role', 'content'}} or {{'from', 'value'}}, got {shown(given)}.")
    left = {key: value for key, value in given.items() if value is not None}
    alias = _take(left, names["role"])
    role = dialect.role(alias) if isinstance(alias, str) else None
    if role is None:
        raise InputError(
            "the role must be one of system, user, assistant and tool, or a known name of one, got "
            f"{shown(alias)}. Say what it stands for with data.roles={{name: role}}."
        )
    weight = None if dialect.flags.isdisjoint(left) else _flags(left, names)
    content, what = _content(given, left, role, names["content"], ignored)
    message: Message = {"role": role}
    results: list[Message] = []
    if not left and isinstance(content, str) and role != "tool" and alias.lower() not in CALLERS:
        return [({**message, "content": text_of(content, what)}, weight)]
    if role == "tool":
        message["content"] = read_result(content, what)
        for name in ("name", "tool_call_id"):
            if (value := _take(left, names[name])) is not None:
                message[name] = text_of(value, repr(name))
    else:
        calls = _calls(left, names)
        if alias.lower() in CALLERS:
            content, calls = "", [*calls, *_as_list(decoded(content, "the function call"))]
        parts = _parts(content, ignored) if isinstance(content, list) else _Parts(content)
        if parts.text is None and calls:
            parts.text = ""
        message["content"] = text_of(parts.text, what)
        if role == "assistant":
            _answer(message, parts, calls, _thoughts(parts, left, names), ignored)
        elif parts.reasoning is not None or calls or parts.calls:
            raise InputError(f"only an assistant has reasoning and tool calls, but the role is {alias!r}.")
        results = parts.results
    _refuse_others(left, dialect, alias, ignored)
    if results and role != "user":
        raise InputError(f"only a user's message carries results of tools, but the role is {alias!r}.")
    turns = [*results, message] if message["content"] or not results else results
    return [(turn, weight) for turn in turns]


def _plain(given: Any) -> Message | None:
    """The message, if it is in the normal form already and has a text alone, as most are: no names to look up."""
    if type(given) is dict and len(given) == 2 and given.get("role") in _ROLES and type(given.get("content")) is str:
        if not given["content"].isascii():
            text_of(given["content"], f"'content' ({given['role']})")
        return given
    return None


@dataclass
class _Parts:
    """Content that is a list: its text, its reasoning, its tool calls, and results of tools as turns of their own."""

    text: Any = None
    reasoning: str | None = None
    calls: list[Any] = field(default_factory=list)
    results: list[Message] = field(default_factory=list)


def _content(
    given: Mapping[str, Any], left: dict[str, Any], role: str, names: tuple[str, ...], ignored: set[str]
) -> tuple[Any, str]:
    """The content of a message, and what it is called there; other keys that repeat it say nothing."""
    key = next((name for keys in (left, given) for name in names if name in keys), names[0])
    content = left.pop(key, None)
    for name in names if left and content is not None else ():
        if name in left and left[name] == content:
            del left[name]
            ignored.add(f"messages[].{name}")
    return content, f"{key!r} ({role})"


def _thoughts(parts: _Parts, left: dict[str, Any], names: Mapping[str, tuple[str, ...]]) -> list[tuple[str, Any]]:
    """The reasoning of an assistant, wherever it is, with the name of its place."""
    inside = [("a part of the content", parts.reasoning)] if parts.reasoning is not None else []
    return inside + [(repr(key), left.pop(key)) for key in names["reasoning_content"] if key in left]


def _answer(
    message: Message, parts: _Parts, calls: list[Any], thoughts: list[tuple[str, Any]], ignored: set[str]
) -> None:
    """Add reasoning and tool calls to the message of an assistant."""
    if any(thought != thoughts[0][1] for _, thought in thoughts):
        raise InputError(f"the reasoning is there twice: {thoughts[0][0]} and {thoughts[1][0]}. Keep one.")
    for name, value in thoughts[:1]:
        message["reasoning_content"] = text_of(value, name)
    if calls and parts.calls:
        raise InputError("the tool calls are there twice: in 'tool_calls' and in parts of the content. Keep one.")
    if calls := calls or parts.calls:
        message["tool_calls"] = [read_call(call, f"tool call {n}", ignored) for n, call in enumerate(calls, 1)]


def _calls(left: dict[str, Any], names: Mapping[str, tuple[str, ...]]) -> list[Any]:
    """The calls of ``tool_calls``, and that of ``function_call``, as OpenAI had it before."""
    calls = _take(left, names["tool_calls"]) or []
    if isinstance(calls, str):
        calls = decoded(calls, "'tool_calls'")
    if not isinstance(calls, list):
        raise InputError(f"'tool_calls' must be a list, got {shown(calls)}.")
    former = _take(left, names["function_call"])
    return calls if former in (None, "", {}) else [*calls, former]


def _refuse_others(left: dict[str, Any], dialect: Dialect, alias: str, ignored: set[str]) -> None:
    """Count the keys that say nothing.

    Raises:
        InputError: When a key is left that may say something.
    """
    others = []
    for key, value in left.items():
        if key in dialect.ignored or value in _EMPTY:
            ignored.add(f"messages[].{key}")
        else:
            others.append(str(key))
    if others:
        raise InputError(
            f"the keys {sorted(others)} have no meaning in a message of the role {alias!r}. Remove them, or say what "
            "they are with data.message_keys={key: ignored}, or another meaning."
        )


def _flags(left: dict[str, Any], names: Mapping[str, tuple[str, ...]]) -> float | None:
    """The product of the flags of a message, which are taken out of it."""
    flags: list[float] = []
    for key in ("loss", "train"):
        if (flag := _take(left, names[key])) is not None:
            if not isinstance(flag, bool):
                raise InputError(f"{key!r} must be true or false, got {shown(flag)}. A number is a 'weight'.")
            flags.append(float(flag))
    for key in ("weight", "loss_weight"):
        if (value := _take(left, names[key])) is not None:
            flags.append(weight_of(value, repr(key)))
    return math.prod(flags) if flags else None


def _parts(parts: list[Any], ignored: set[str]) -> _Parts:
    """Content that is a list of parts."""
    texts: dict[int, list[str]] = {0: [], 1: []}
    found, last = _Parts(), 0
    for number, part in enumerate(parts, 1):
        what, part = f"part {number} of the content", _typed(part)
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "tool_result":
            found.results.append(_result(part, what, ignored))
            continue
        if kind in _TEXTS:
            part, kind = {**part, "type": "text"}, "text"
        if not isinstance(kind, str) or kind not in _PARTS:
            raise InputError(f"{what} must be of the type {', '.join(_PARTS)} or tool_result, got {shown(part)}.")
        if _PARTS[kind] < last:
            raise InputError(f"{what} is {kind}, which stands before the parts of other types. Put it there.")
        last = _PARTS[kind]
        if kind == "tool_use":
            found.calls.append(part)
            continue
        filled = _filled(part, ignored)
        if len(filled) != 1 or next(iter(filled)) not in ("value", kind):
            raise InputError(f"{what} must have its {kind} in {kind!r} or 'value' and nothing else, got {shown(part)}.")
        [value] = filled.values()
        if kind == "tool_call":
            found.calls.extend(_as_list(decoded(value, what)))
        else:
            texts[last].append(text_of(value, what))
    found.text = "".join(texts[1])
    found.reasoning = "".join(texts[0]) if texts[0] else None
    return found


def _typed(part: Any) -> Any:
    """A part with its type: Gemini's and Bedrock's have none, and are told by their one key."""
    if not isinstance(part, Mapping) or "type" in part or len(part) != 1:
        return part
    [(key, value)] = part.items()
    if key == "functionCall":
        return {"type": "tool_call", "value": [value]}
    if key == "functionResponse" and isinstance(value, Mapping):
        return {"type": "tool_result", "content": value.get("response"), "name": value.get("name")}
    return {"type": "text", "text": value} if key == "text" else part


def _result(part: Mapping[str, Any], what: str, ignored: set[str]) -> Message:
    """Anthropic's result of a tool, as a turn of the tool."""
    filled = _filled(part, ignored)
    turn: Message = {"role": "tool", "content": read_result(filled.pop("content", ""), what)}
    for key, name in (("name", "name"), ("tool_use_id", "tool_call_id")):
        if key in filled:
            turn[name] = text_of(filled.pop(key), repr(key))
    if filled:
        raise InputError(f"{what}: a tool_result has 'tool_use_id', 'content' and nothing else, got {shown(part)}.")
    return turn


def _filled(part: Mapping[str, Any], ignored: set[str]) -> dict[str, Any]:
    """The keys of a part that say something, but for its type."""
    filled = {key: value for key, value in part.items() if value is not None and key != "type"}
    for key in () if _NOTHING.isdisjoint(filled) else _NOTHING & filled.keys():
        ignored.add(f"messages[].content[].{key}")
        del filled[key]
    return filled


def _take(left: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first of the names that is there, which is taken out; ``None`` where none is."""
    for name in names:
        if name in left:
            return left.pop(name)
    return None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
