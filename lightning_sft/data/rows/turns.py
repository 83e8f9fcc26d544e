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

from lightning_sft.data.rows.calls import MEDIA, read_call, read_result
from lightning_sft.data.rows.dialects import CALLERS, COMMON, IGNORE, Dialect
from lightning_sft.data.rows.markup import inline_calls, inline_thought
from lightning_sft.data.rows.values import decoded, decoded_call, shown, text_of, weight_of
from lightning_sft.types import InputError, Message

Turn = tuple[Message, float | None]
"""A message in its normal form, and the weight that its flags give it, or ``None`` where it has no flags."""

_PARTS = {"reasoning": 0, "thinking": 0, "text": 1, "tool_call": 2, "tool_use": 2}  # as templates order them
_THOUGHTS = ("reasoning", "thinking")
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
    return _Message(given, dialect, set() if ignored is None else ignored).turns()


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
    thought: str = ""  # type of the parts that have the reasoning
    calls: list[Any] = field(default_factory=list)
    results: list[Message] = field(default_factory=list)


class _Message:
    """A message whose keys are taken out one after the other; those that are left say nothing, or are refused."""

    def __init__(self, given: Any, dialect: Dialect, ignored: set[str]) -> None:
        names = dialect.names
        if not isinstance(given, Mapping) or not any(name in given for name in names["role"]):
            raise InputError(f"expected {{'role', 'content'}} or {{'from', 'value'}}, got {shown(given)}.")
        self.given, self.dialect, self.names, self.ignored = given, dialect, names, ignored
        self.left = {key: value for key, value in given.items() if value is not None}
        alias = self.take("role")
        role = dialect.role(alias) if isinstance(alias, str) else None
        if role is None:
            raise InputError(
                "the role must be one of system, user, assistant and tool, or a known name of one, got "
                f"{shown(alias)}. Say what it stands for with data.roles={{name: role}}."
            )
        self.alias, self.role, self.is_call = alias, role, alias.lower() in CALLERS

    def take(self, key: str) -> Any:
        """The value of a key under the first of its names that is there, which is taken out; else ``None``."""
        for name in self.names[key]:
            if name in self.left:
                return self.left.pop(name)
        return None

    def turns(self) -> list[Turn]:
        """The turns in the normal form, each with the weight of the message."""
        weight = self._flags()
        content, what = self._content()
        if not self.left and isinstance(content, str) and self.role != "tool" and not self.is_call:
            return [({"role": self.role, "content": text_of(content, what)}, weight)]
        turns = [self._tool(content, what)] if self.role == "tool" else self._spoken(content, what)
        self._refuse_others()
        return [(turn, weight) for turn in turns]

    def _flags(self) -> float | None:
        """The product of the flags."""
        if self.dialect.flags.isdisjoint(self.left):
            return None
        flags: list[float] = []
        for key in ("loss", "train"):
            if (flag := self.take(key)) is not None:
                if not isinstance(flag, bool):
                    raise InputError(f"{key!r} must be true or false, got {shown(flag)}. A number is a 'weight'.")
                flags.append(float(flag))
        for key in ("weight", "loss_weight"):
            if (value := self.take(key)) is not None:
                flags.append(weight_of(value, repr(key)))
        return math.prod(flags) if flags else None

    def _content(self) -> tuple[Any, str]:
        """The content, and what it is called in the message; other keys that repeat it say nothing."""
        names, left = self.names["content"], self.left
        key = next((name for keys in (left, self.given) for name in names if name in keys), names[0])
        content = left.pop(key, None)
        for name in names if left and content is not None else ():
            if name in left and left[name] == content:
                del left[name]
                self.ignored.add(f"messages[].{name}")
        return content, f"{key!r} ({self.role})"

    def _tool(self, content: Any, what: str) -> Message:
        turn: Message = {"role": "tool", "content": read_result(content, what)}
        for name in ("name", "tool_call_id"):
            if (value := self.take(name)) is not None:
                turn[name] = text_of(value, repr(name))
        return turn

    def _spoken(self, content: Any, what: str) -> list[Message]:
        """The turn of anyone but a tool, after the results of tools that it carries."""
        calls = self._calls()
        if self.is_call:
            given = inline_calls(content) if isinstance(content, str) else [content]
            own = [call for each in given for call in _as_list(decoded_call(each, "the function call"))]
            content, calls = "", [*calls, *own]
        parts = _parts(content, self.dialect, self.ignored) if isinstance(content, list) else _Parts(content)
        if parts.text is None and calls:
            parts.text = ""
        turn: Message = {"role": self.role, "content": text_of(parts.text, what)}
        if self.role == "assistant":
            self._add_thought_and_calls(turn, parts, calls)
        elif parts.reasoning is not None or calls or parts.calls:
            raise InputError(f"only an assistant has reasoning and tool calls, but the role is {self.alias!r}.")
        if not parts.results:
            return [turn]
        if self.role != "user":
            raise InputError(f"only a user's message carries results of tools, but the role is {self.alias!r}.")
        return [*parts.results, turn] if turn["content"] else parts.results

    def _calls(self) -> list[Any]:
        """The calls of ``tool_calls``, or that of ``function_call``, as OpenAI had it before."""
        calls = self.take("tool_calls") or []
        if isinstance(calls, str):
            calls = decoded(calls, "'tool_calls'")
        if not isinstance(calls, list):
            raise InputError(f"'tool_calls' must be a list, got {shown(calls)}.")
        if (former := self.take("function_call")) in (None, "", {}):
            return calls
        if calls:
            raise InputError("the tool calls are there twice: in 'tool_calls' and in 'function_call'. Keep one.")
        return [former]

    def _add_thought_and_calls(self, turn: Message, parts: _Parts, calls: list[Any]) -> None:
        thoughts = [("a part of the content", parts.reasoning)] if parts.reasoning is not None else []
        keys = [key for key in self.names["reasoning_content"] if key in self.left]
        thoughts += [(repr(key), _of_blocks(self.left.pop(key))) for key in keys]
        thoughts = [(key, value) for key, value in thoughts if value not in _EMPTY] or thoughts[:1]
        if any(thought != thoughts[0][1] for _, thought in thoughts):
            raise InputError(f"the reasoning is there twice: {thoughts[0][0]} and {thoughts[1][0]}. Keep one.")
        for name, value in thoughts[:1]:
            turn["reasoning_content"] = text_of(value, name)
            if value.strip() and (found := inline_thought(turn["content"])):
                if found[0].strip() not in ("", value.strip()):
                    unused = ", ".join(f"{key}: ignored" for key in filter(None, (parts.thought, *keys)))
                    raise InputError(
                        f"the reasoning is there twice: {name} and in tags in the content, and they differ. Keep one; "
                        f"data.message_keys={{{unused}}} keeps that of the content."
                    )
                turn["content"] = found[1]
        if calls and parts.calls:
            raise InputError("the tool calls are there twice: in 'tool_calls' and in parts of the content. Keep one.")
        if calls := calls or parts.calls:
            turn["tool_calls"] = [read_call(call, f"tool call {n}", self.ignored) for n, call in enumerate(calls, 1)]

    def _refuse_others(self) -> None:
        """Count the keys that say nothing.

        Raises:
            InputError: When a key is left that may say something.
        """
        others = []
        for key, value in self.left.items():
            if key in self.dialect.ignored or value in _EMPTY:
                self.ignored.add(f"messages[].{key}")
            else:
                others.append(str(key))
        if others:
            raise InputError(
                f"the keys {sorted(others)} have no meaning in a message of the role {self.alias!r}. Remove them, or "
                "say what they are with data.message_keys={key: ignored}, or another meaning."
            )


def _parts(parts: list[Any], dialect: Dialect, ignored: set[str]) -> _Parts:
    """Content that is a list of parts."""
    texts: dict[int, list[str]] = {0: [], 1: []}
    found, last = _Parts(), 0
    for number, part in enumerate(parts, 1):
        what, part = f"part {number} of the content", _typed(part)
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "tool_result" and not last:
            found.results.append(_result(part, what, ignored))
            continue
        if kind in _THOUGHTS and dialect.keys.get(kind) == IGNORE:
            ignored.add(f"messages[].content[].{kind}")
            continue
        if kind in _TEXTS:
            part, kind = {**part, "type": "text"}, "text"
        if isinstance(kind, str) and kind in MEDIA:
            raise InputError(
                f"{what} is of the type {kind!r}, and only texts can be trained on: the processor of a model of images "
                "and text is not used in training yet. To leave such rows out: data.invalid_rows=skip. To learn their "
                "texts without such parts, name the format of the rows: data.format=chat, or sharegpt, …."
            )
        if not isinstance(kind, str) or (kind not in _PARTS and kind != "tool_result"):
            raise InputError(f"{what} must be of the type {', '.join(_PARTS)} or tool_result, got {shown(part)}.")
        if _PARTS.get(kind, 0) < last:
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
            found.thought = found.thought or (kind if kind in _THOUGHTS else "")
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


def _of_blocks(value: Any) -> Any:
    """The text of a thought that is a list of blocks, as OpenRouter and LiteLLM keep them; anything else as it is.

    Blocks that are encrypted or summaries have no text of the thought.
    """
    if not isinstance(value, list) or not all(isinstance(block, Mapping) for block in value):
        return value
    return "".join(str(block.get("text") or block.get("thinking") or "") for block in value)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
