"""Thoughts in texts: the tags that begin and end them, in an answer and at the end of a prompt."""

from __future__ import annotations

import re

from lightning_sft.types import Message

_TAG = r"(?:\w+:)?think[\w:]*"  # of a thought: <think>, <seed:think>, <think:opensource>
OPENING = re.compile(rf"(?:<(?P<tag>{_TAG}|thought\w*|reason\w*)>|\[(?P<mark>THINK)\])(?P<space>\s*)\Z")
INLINE = re.compile(r"(?s)\s*<(think|thinking)>(?P<thought>.*?)</\1>\s*(?P<text>.*)\Z")
THOUGHT_WORD = re.compile(r"\s*((think|thought|thinking|reasoning)\s*)?")
EMPTY_THOUGHT = re.compile(rf"\s*(<{_TAG}>\s*)?</{_TAG}>")
TAGS = re.compile(rf"</?{_TAG}>")
_ENDING = re.compile(rf"</{_TAG}>\s*\Z")


def are_ended_by(prompt: str) -> bool:
    r"""Whether a prompt ends with the end of a thought.

    >>> are_ended_by("<think>\n\n</think>\n\n"), are_ended_by("<think>\n")
    (True, False)
    """
    return _ENDING.search(prompt, max(0, len(prompt) - 64)) is not None


def closing(opened: re.Match[str]) -> str:
    r"""What ends a thought that a prompt begins, where it is left empty.

    >>> closing(OPENING.search("<|assistant|><think>\n"))
    '\n</think>\n\n'
    """
    tag, space = "[/THINK]" if opened["mark"] else f"</{opened['tag']}>", opened["space"]
    return f"{space}{tag}{2 * space}"


def taken_apart(message: Message) -> Message:
    """An answer whose text begins with a thought in tags, with the thought as its reasoning."""
    found = INLINE.match(message["content"]) if message["role"] == "assistant" else None
    if found is None or message.get("reasoning_content"):
        return message
    return {**message, "content": found["text"], "reasoning_content": found["thought"].strip()}
