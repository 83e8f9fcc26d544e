"""What of a conversation a chat template does not show before an answer: tools, system turns, calls and their results.

That is no error, since inference has the same context, and it is seldom wanted. A name or a text that stands in the
rendered text is no proof that it is shown: a short one may stand there as a part of another. So it is shown where a
piece of it stands there that is long and stands nowhere else. All others, and all calls, are decided by another
rendering, in which each has a text of its own that stands nowhere else; conversations of one shape share that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lightning_sft.data.tokens.answer_shape import sentinel_text, shape_of, with_sentinels
from lightning_sft.data.tokens.template import Template
from lightning_sft.types import InputError, Message

TOOLS_NOT_SHOWN = "the chat template does not show the tools"
SYSTEM_NOT_SHOWN = "the chat template does not show a system turn"
CALLS_NOT_SHOWN = "the chat template does not show all of an earlier tool call or its result"
"""Notes that an audit looks for."""

_PLAIN = re.compile(r"[\w ,.]+")  # characters that templates do not escape
_LONG = 16  # characters of a piece that does not stand in a text by chance
_READ = 512  # characters of a text in which such a piece is looked for


def not_shown(
    template: Template,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    variables: Mapping[str, Any],
    text: str,
    trained: Collection[int],
) -> set[str]:
    """Notes on what a template does not show.

    Args:
        template: The template.
        messages: The messages up to and with the last that is trained.
        tools: Tools of the conversation.
        variables: Variables of the template.
        text: The rendered text of the messages.
        trained: Numbers of the messages that are trained in it, and so are in it as they are.
    """
    parts = [
        (number, message)
        for number, message in enumerate(messages)
        if number not in trained and (message["role"] in ("system", "tool") or message.get("tool_calls"))
    ]
    if not parts and not tools:
        return set()
    source = template.renderer_for(tools, variables).text
    said = f"{source}{variables}{list(messages)}"
    whole = f"{said}{tools}"
    doubtful = [number for number, message in parts if not _is_shown_once(message, text, whole)]
    has_doubtful_tools = not all(_is_tool_shown(tool, text, said) for tool in tools or ())
    if not doubtful and not has_doubtful_tools:
        return set()
    shapes = tuple((m["role"], shape_of(m), m["content"] if m["role"] == "system" else "") for m in messages)
    shown = json.dumps(dict(variables), sort_keys=True, default=str)
    key = "shown", source, shown, shapes, len(tools or ()), tuple(doubtful), has_doubtful_tools
    found: set[str] = template.learnt(
        key, lambda: _tried(template, messages, tools, variables, doubtful, has_doubtful_tools, text)
    )
    return found


def _is_shown_once(message: Message, text: str, whole: str) -> bool:
    """Whether a long piece of a message stands in a text, and but once in all that it may come from."""
    piece = "" if message.get("tool_calls") else _piece(message["content"])
    return len(piece) >= _LONG and piece in text and whole.count(piece) == 1


def _is_tool_shown(tool: Mapping[str, Any], text: str, said: str) -> bool:
    """Whether the name of a tool stands in a text, and it or its description can only come from the tool."""
    function = _function(tool)
    name, piece = str(function.get("name", "")), _piece(str(function.get("description") or ""))
    if name not in text:
        return False
    return name not in said or (len(piece) >= _LONG and piece in text and piece not in said)


def _piece(text: str) -> str:
    return max(map(str.strip, _PLAIN.findall(text[:_READ])), key=len, default="")


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else tool


def _tried(
    template: Template,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    variables: Mapping[str, Any],
    doubtful: Sequence[int],
    has_doubtful_tools: bool,
    text: str,
) -> set[str]:
    """The same of the doubtful parts, by a rendering in which each has a text of its own."""
    made, sentinels = list(messages), dict[str, tuple[str, str]]()  # text -> the note, and what stood in its place

    def sentinel(note: str, instead_of: str) -> str:
        name = sentinel_text(len(sentinels))
        sentinels[name] = note, instead_of
        return name

    for number in doubtful:
        message = messages[number]
        if message["role"] == "system" and message["content"].strip():
            # behind the text, which a template may look at, as for /no_think
            own = sentinel(SYSTEM_NOT_SHOWN, message["content"].strip())
            made[number] = {**message, "content": f"{message['content']} {own}"}
        elif message["role"] == "tool" and message["content"].strip():
            made[number] = {**message, "content": sentinel(CALLS_NOT_SHOWN, message["content"].strip())}
        elif message.get("tool_calls"):
            calls = with_sentinels({"role": "assistant", "tool_calls": message["tool_calls"]}, len(sentinels))
            made[number] = {**message, "tool_calls": calls.message["tool_calls"]}
            sentinels |= dict.fromkeys(calls.fields, (CALLS_NOT_SHOWN, ""))
    named = tools
    if has_doubtful_tools:
        named = []
        for tool in tools or ():
            function = {**_function(tool), "name": sentinel(TOOLS_NOT_SHOWN, str(_function(tool).get("name", "")))}
            named.append({**tool, "function": function} if "function" in tool else function)
    end = len(made) - (made[-1]["role"] == "assistant")
    try:
        shown = template.rendered(made[:end], named, True, variables)[0].casefold()
    except InputError:  # it looks at the texts: these alone can be looked for
        return {note for note, own in sentinels.values() if own not in text}
    return {note for name, (note, _) in sentinels.items() if name.casefold() not in shown}
