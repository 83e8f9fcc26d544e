"""Markup that texts of data sets have: thoughts in tags."""

from __future__ import annotations

import re

_THOUGHT = re.compile(r"(?s)\s*<(think|thinking)>(.*?)</\1>\s*(.*)\Z")
_END = "\n</think>"  # of a thought whose beginning is missing; in prose, the tag stands within a line


def inline_thought(text: str) -> tuple[str, str] | None:
    r"""The thought that begins a text, and the rest; the tag that opens it may be missing, as after a prompt with it.

    >>> inline_thought("<think>Why?</think> So."), inline_thought("Why?\n</think>\n\nSo."), inline_thought("A </think>.")
    (('Why?', 'So.'), ('Why?', 'So.'), None)
    """
    if found := _THOUGHT.match(text):
        return found[2], found[3]
    thought, end, rest = text.partition(_END)
    return (thought, rest.lstrip()) if end and "<think>" not in thought else None
