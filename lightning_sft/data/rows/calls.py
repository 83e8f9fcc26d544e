"""Tools and their calls in the normal form, whatever the interface that they were written for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lightning_sft.data.rows.values import check_json, decoded, shown, text_of
from lightning_sft.types import InputError

_ARGUMENTS = ("arguments", "parameters", "input", "args")  # of OpenAI, Llama, Anthropic, LangChain
_KINDS = ("function", "tool_call", "tool_use")
_SCHEMAS = ("parameters", "input_schema")
MEDIA = frozenset({"image", "image_url", "input_image", "audio", "input_audio", "video", "document", "file"})
"""Types of parts that are no texts."""


def read_tools(given: Any) -> list[dict[str, Any]] | None:
    """Tool descriptions, from a list or its JSON text, as ``{"type": "function", "function": {"name": ...}}``.

    Raises:
        InputError: When they are something else.

    >>> read_tools([{"name": "weather", "input_schema": {"type": "object"}}])
    [{'type': 'function', 'function': {'name': 'weather', 'parameters': {'type': 'object'}}}]
    """
    tools = decoded(given, "'tools'") if given else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"'tools' must be a list of objects, or the JSON text of one, got {shown(tools)}.")
    check_json(tools, "'tools'")
    return [_described(tool) if "name" in tool else tool for tool in tools]


def read_call(given: Any, what: str, ignored: set[str]) -> dict[str, Any]:
    """A tool call, also one without the ``function`` around its name and arguments.

    Args:
        given: The call.
        what: What it is called in messages.
        ignored: Takes in the keys that say nothing.

    Raises:
        InputError: When it has no name, or a key that is no part of a call.

    >>> read_call({"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}, "a call", set())
    {'id': 't1', 'type': 'function', 'function': {'name': 'weather', 'arguments': {'city': 'Rome'}}}
    """
    if not isinstance(given, Mapping):
        raise InputError(f"{what} must be an object with 'function', got {shown(given)}.")
    left = {key: value for key, value in given.items() if value is not None}
    for key in ("index", "cache_control"):
        if left.pop(key, None) is not None:
            ignored.add(f"messages[].tool_calls[].{key}")
    call = {"id": text_of(left.pop("id"), f"the id of {what}")} if "id" in left else {}
    kind, inner = left.pop("type", "function"), left.pop("function", None)
    if inner is None:
        left, inner = {}, left
    arguments = [key for key in _ARGUMENTS if isinstance(inner, Mapping) and key in inner]
    is_call = kind in _KINDS and isinstance(inner, Mapping) and not left
    if not is_call or len(arguments) > 1 or inner.keys() != {"name", *arguments}:
        raise InputError(f"{what} must be a function with 'name' and 'arguments' and nothing else, got {shown(given)}.")
    values = inner[arguments[0]] if arguments else None
    values = {} if values in (None, "") else decoded(values, f"the arguments of {what}")
    if not isinstance(values, dict):
        raise InputError(f"the arguments of {what} must be an object or its JSON text, got {shown(values)}.")
    check_json(values, f"the arguments of {what}")
    function = {"name": text_of(inner["name"], f"the name of {what}"), "arguments": values}
    return {**call, "type": "function", "function": function}


def read_result(value: Any, what: str) -> str:
    """What a tool gave back, as text: that of its parts, or the JSON text of an object or a list.

    Raises:
        InputError: When it is nothing, holds an image or the like, or has no JSON.

    >>> read_result({"city": "Rome", "degrees": 21}, "a result")
    '{"city": "Rome", "degrees": 21}'
    >>> read_result([{"type": "text", "value": "21"}], "a result")
    '21'
    """
    if value is None or isinstance(value, str):
        return text_of(value, what)
    if isinstance(value, list) and value:
        kinds = [part.get("type") if isinstance(part, Mapping) else None for part in value]
        texts = [part.get("text", part.get("value")) for part in value if isinstance(part, Mapping)]
        if all(kind == "text" for kind in kinds) and all(isinstance(text, str) for text in texts):
            return "".join(text_of(text, what) for text in texts)
        if found := sorted(MEDIA.intersection(kind for kind in kinds if isinstance(kind, str))):
            raise InputError(f"{what} has a part of the type {found[0]!r}, and only texts can be trained on.")
    check_json(value, what)
    return json.dumps(value, ensure_ascii=False)


def _described(tool: dict[str, Any]) -> dict[str, Any]:
    """A description without the ``function`` around it, or one for Anthropic's interface."""
    function = {key: value for key, value in tool.items() if key not in ("type", "cache_control")}
    if "input_schema" in function and "parameters" not in function:
        function = {"parameters" if key == "input_schema" else key: value for key, value in function.items()}
    return {"type": "function", "function": function}
