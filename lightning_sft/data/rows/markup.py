"""Markup that texts of data sets have: thoughts, calls and results in tags, and places of images and sounds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_sft.data.rows.calls import MEDIA
from lightning_sft.data.rows.dialects import KEYS

MEDIA_COLUMNS = ("image", "images", "audio", "audios", "video", "videos")
"""Columns of images and sounds that belong to the texts of a row."""

_THOUGHT = re.compile(r"(?s)\s*<(think|thinking)>(.*?)</\1>\s*(.*)\Z")
_CALL = re.compile(r"(?s)\s*<tool_call>(.*?)</tool_call>\s*")
_RESULT = re.compile(r"(?s)\s*<tool_response>\n?(.*?)\n?</tool_response>\s*\Z")
_END = "\n</think>"  # of a thought whose beginning is missing; in prose, the tag stands within a line


def inline_thought(text: str) -> tuple[str, str] | None:
    r"""The thought that begins a text, and the rest; the tag that opens it may be missing, as after a prompt with it.

    >>> inline_thought("<think>Why?</think> So."), inline_thought("Why?\n</think>\nSo."), inline_thought("A </think>.")
    (('Why?', 'So.'), ('Why?', 'So.'), None)
    """
    if found := _THOUGHT.match(text):
        return found[2], found[3]
    thought, end, rest = text.partition(_END)
    return (thought, rest.lstrip()) if end and "<think>" not in thought else None


def inline_calls(text: str) -> list[str]:
    r"""The calls of tools in tags that a text consists of; the text itself, where it is anything else.

    >>> inline_calls("<tool_call>\n{}\n</tool_call>\n<tool_call>[]</tool_call>"), inline_calls("{}")
    (['\n{}\n', '[]'], ['{}'])
    """
    return _CALL.findall(text) if text.strip() and not _CALL.sub("", text) else [text]


def inline_result(text: str) -> str:
    r"""The result of a tool without tags around it; of several in tags, the first and the last tag are taken.

    >>> inline_result("<tool_response>\n21\n</tool_response>"), inline_result("21")
    ('21', '21')
    """
    found = _RESULT.match(text)
    return found[1] if found else text


def without_media(message: Any, columns: Iterable[str], ignored: set[str]) -> Any:
    r"""A message as it was given, without its images and sounds, and the places that texts have for them.

    Args:
        message: The message.
        columns: Columns of the row: ``images`` has its places at ``<image>``.
        ignored: Takes in what is left out.

    >>> without_media({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}, [], set())
    {'role': 'user', 'content': [{'type': 'text', 'text': 'Who?'}]}
    >>> without_media({"from": "human", "value": "<image>\nWho?"}, ["images"], set())
    {'from': 'human', 'value': 'Who?'}
    """
    kinds = sorted({column.removesuffix("s") for column in columns if column in MEDIA_COLUMNS})
    places = re.compile(rf"<({'|'.join(kinds)})>\n?") if kinds else None

    def of_text(value: Any) -> Any:
        if places is None or not isinstance(value, str) or not places.search(value):
            return value
        ignored.update(f"messages[].<{found[1]}>" for found in places.finditer(value))
        return places.sub("", value)

    def of_part(part: Any) -> Any:
        is_text = isinstance(part, Mapping) and part.get("type") == "text"
        return {key: of_text(value) for key, value in part.items()} if is_text else of_text(part)

    def of_key(key: str, value: Any) -> Any:
        if not isinstance(value, list) or key not in KEYS["content"]:
            return of_text(value)
        kept = [part for part in value if not (isinstance(part, Mapping) and part.get("type") in MEDIA)]
        ignored.update(f"messages[].content[].{part['type']}" for part in value if part not in kept)
        return list(map(of_part, kept))

    return {key: of_key(key, value) for key, value in message.items()} if isinstance(message, Mapping) else message
