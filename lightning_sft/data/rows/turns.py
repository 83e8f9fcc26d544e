"""One turn of a conversation to its normal form, whatever the format that it came in.

``{"role": "system" | "user" | "assistant" | "tool", "content": str}``, and for an assistant ``reasoning_content`` and
``tool_calls``, for a tool ``name`` and ``tool_call_id``. A key that has no place here is an error; null is no value.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from lightning_sft.data.rows import strict_json
from lightning_sft.types import InputError, Message

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_REASONING = ("reasoning_content", "thinking", "reasoning")
_PARTS = {"reasoning": 0, "thinking": 0, "text": 1, "tool_call": 2}  # in the order in which templates write them
_DEEPEST, _LONGEST = 64, 4096  # levels of JSON, bits of an integer: Python does not write much longer ones
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


def read_turn(given: Any) -> tuple[Message, float | None]:
    """A message in its normal form, and the weight that its flags give it, or ``None`` where it has no flags.

    Raises:
        InputError: When it has no role, no text, a key without a meaning, or a value that is not of its kind.

    >>> read_turn({"from": "gpt", "value": "Hello", "weight": 0.5})
    ({'role': 'assistant', 'content': 'Hello'}, 0.5)
    """
    if not isinstance(given, Mapping) or not ("role" in given or "from" in given):
        raise InputError(f"expected {{'role', 'content'}} or {{'from', 'value'}}, got {shown(given)}.")
    left = {key: value for key, value in given.items() if value is not None}
    names = ("from", "value") if "from" in given else ("role", "content")
    alias = left.pop(names[0], None)
    if not isinstance(alias, str) or alias not in ROLES:
        raise InputError(f"the role must be one of {', '.join(ROLES)}, got {shown(alias)}.")
    weight = _flags(left)
    role, content, calls = ROLES[alias], left.pop(names[1], None), left.pop("tool_calls", None) or []
    if alias == "function_call":
        content, calls = "", _as_list(_decoded(content, "the function call"))
    elif content is None and calls:
        content = ""
    text, reasoning, more_calls = _parts(content) if isinstance(content, list) else (content, None, [])
    turn: Message = {"role": role, "content": text_of(text, f"{names[1]!r} ({role})")}
    if role == "tool":
        turn |= {key: text_of(left.pop(key), repr(key)) for key in ("name", "tool_call_id") if key in left}
    if role == "assistant":
        thoughts = [("a part of the content", reasoning)] if reasoning is not None else []
        thoughts += [(repr(key), left.pop(key)) for key in _REASONING if key in left]
        if len(thoughts) > 1:
            raise InputError(f"the reasoning is there twice: {thoughts[0][0]} and {thoughts[1][0]}. Keep one.")
        for name, value in thoughts:
            turn["reasoning_content"] = text_of(value, name)
    elif reasoning is not None or calls or more_calls:
        raise InputError(f"only an assistant has reasoning and tool calls, but the role is {alias!r}.")
    if calls and more_calls:
        raise InputError("the tool calls are there twice: in 'tool_calls' and in parts of the content. Keep one.")
    if left:
        raise InputError(f"the keys {sorted(map(str, left))} have no meaning in a message of the role {alias!r}.")
    if calls or more_calls:
        if not isinstance(calls, list):
            raise InputError(f"'tool_calls' must be a list, got {shown(calls)}.")
        turn["tool_calls"] = [_call(call, f"tool call {n}") for n, call in enumerate(calls or more_calls, 1)]
    return turn, weight


def read_tools(given: Any) -> list[dict[str, Any]] | None:
    """Tool descriptions, from a list or its JSON text, as ``{"type": "function", "function": {"name": ...}}``.

    Raises:
        InputError: When they are something else.
    """
    tools = _decoded(given, "'tools'") if given else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"'tools' must be a list of objects, or the JSON text of one, got {shown(tools)}.")
    _check_json(tools, "'tools'")
    return [{"type": "function", "function": tool} if "name" in tool else tool for tool in tools]


def text_of(value: Any, what: str) -> str:
    """The value, if it is a text.

    Raises:
        InputError: When it is none.
    """
    if not isinstance(value, str):
        raise InputError(f"{what} must be a string, got {shown(value)}.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{what} has half a character at {error.start}: {shown(value[error.start])}.") from error
    return value


def weight_of(value: Any, what: str) -> float:
    """The value, if it is a weight; CSV has it as text.

    Raises:
        InputError: When it is no finite number of at least 0.
    """
    try:
        weight = math.nan if isinstance(value, bool) or not isinstance(value, (int, float, str)) else float(value)
    except (ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise InputError(f"{what} must be a finite number that is not negative, got {shown(value)}.")
    return weight


def shown(value: Any) -> str:
    """A value with its type, cut short."""
    try:
        return f"{type(value).__name__} {_repr.repr(value)}"
    except ValueError:  # an integer of thousands of digits
        return type(value).__name__


def _flags(left: dict[str, Any]) -> float | None:
    """The product of the flags of a message, which are taken out of it."""
    flags: list[float] = []
    for key in ("loss", "train"):
        if key in left:
            if not isinstance(flag := left.pop(key), bool):
                raise InputError(f"{key!r} must be true or false, got {shown(flag)}. A number is a 'weight'.")
            flags.append(float(flag))
    flags += [weight_of(left.pop(key), repr(key)) for key in ("weight", "loss_weight") if key in left]
    return math.prod(flags) if flags else None


def _parts(parts: list[Any]) -> tuple[str, str | None, list[Any]]:
    """Content that is a list: its text, its reasoning and its tool calls."""
    texts: dict[str, list[Any]] = {"reasoning": [], "thinking": [], "text": [], "tool_call": []}
    last = 0
    for number, part in enumerate(parts, 1):
        what = f"part {number} of the content"
        if not isinstance(part, Mapping) or not isinstance(kind := part.get("type"), str) or kind not in _PARTS:
            raise InputError(f"{what} must be of the type {', '.join(_PARTS)}, got {shown(part)}.")
        filled = [(key, value) for key, value in part.items() if value is not None and key != "type"]
        if len(filled) != 1 or filled[0][0] not in ("value", kind):
            raise InputError(f"{what} must have its {kind} in {kind!r} or 'value' and nothing else, got {shown(part)}.")
        if _PARTS[kind] < last:
            raise InputError(f"{what} is {kind}, which stands before the parts of other types. Put it there.")
        last, value = _PARTS[kind], filled[0][1]
        if kind == "tool_call":
            texts[kind].extend(_as_list(_decoded(value, what)))
        else:
            texts[kind].append(text_of(value, what))
    reasoning = [*texts["reasoning"], *texts["thinking"]]
    return "".join(texts["text"]), "".join(reasoning) if reasoning else None, texts["tool_call"]


def _call(given: Any, what: str) -> dict[str, Any]:
    """A tool call, also one without the ``function`` around its name and arguments."""
    if not isinstance(given, Mapping):
        raise InputError(f"{what} must be an object with 'function', got {shown(given)}.")
    left = {key: value for key, value in given.items() if value is not None}
    inner = left.pop("function", None)
    if inner is None:
        inner = {key: left.pop(key) for key in ("name", "arguments") if key in left}
    call = {"id": text_of(left.pop("id"), f"the id of {what}")} if "id" in left else {}
    kind = left.pop("type", "function")
    if kind != "function" or not isinstance(inner, Mapping) or inner.keys() != {"name", "arguments"} or left:
        raise InputError(f"{what} must be a function with 'name' and 'arguments' and nothing else, got {shown(given)}.")
    arguments = _decoded(inner["arguments"], f"the arguments of {what}")
    if not isinstance(arguments, dict):
        raise InputError(f"the arguments of {what} must be an object or its JSON text, got {shown(arguments)}.")
    _check_json(arguments, f"the arguments of {what}")
    function = {"name": text_of(inner["name"], f"the name of {what}"), "arguments": arguments}
    return {**call, "type": "function", "function": function}


def _decoded(value: Any, what: str) -> Any:
    """The value of a JSON text, also of one that was encoded twice; anything else as it is."""
    for _ in range(3):
        if isinstance(value, str):
            try:
                value = strict_json.loads(value)
            except ValueError as error:
                raise InputError(f"{what}: not valid JSON: {error}; got {shown(value)}.") from error
    return value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_json(value: Any, what: str, depth: int = 0) -> None:
    """That a value is one that JSON has, so that a template can write it."""
    if depth > _DEEPEST:
        raise InputError(f"{what}: nested more than {_DEEPEST} deep.")
    if isinstance(value, dict):
        for key, inner in value.items():
            text_of(key, f"a key in {what}")
            _check_json(inner, what, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_json(inner, what, depth + 1)
    elif isinstance(value, str):
        text_of(value, f"a text in {what}")
    elif isinstance(value, int):
        if value.bit_length() > _LONGEST:
            raise InputError(f"{what}: an integer of {value.bit_length():,} bits is too long.")
    elif value is not None and not (isinstance(value, float) and math.isfinite(value)):
        raise InputError(f"{what}: JSON has no value such as {shown(value)}.")
