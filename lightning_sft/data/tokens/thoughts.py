"""Thoughts in texts: the tags that begin and end them, in an answer and at the end of a prompt."""

from __future__ import annotations

import re

from lightning_sft.data.rows.markup import inline_thought
from lightning_sft.types import InputError, Message

_TAG = r"(?:\w+:)?think[\w:]*"  # of a thought: <think>, <seed:think>, <think:opensource>
OPENING = re.compile(rf"(?:<(?P<tag>{_TAG}|thought\w*|reason\w*)>|\[(?P<mark>THINK)\])(?P<space>\s*)\Z")
THOUGHT_WORD = re.compile(r"\s*((think|thought|thinking|reasoning)\s*)?")
EMPTY_THOUGHT = re.compile(rf"\s*(<{_TAG}>\s*)?</{_TAG}>")
TAGS = re.compile(rf"</?{_TAG}>")
_ANY_OPENING = re.compile(rf"(?i)<(?:{_TAG}|thought\w*|reason\w*)>|\[THINK\]")
_ENDING = re.compile(rf"</{_TAG}>\s*\Z")
_BEGUN = re.compile(r"\s*<(think|thinking)>")

UNTHINKING = (
    "an empty thought is trained, so the model learns not to think (with data.chat_template_kwargs={enable_thinking: "
    "false}, where the template has that, it is context)"
)
TAKEN_APART = "thoughts in the texts of answers take the place of the empty ones that would be trained before them"
UNREAD = (
    "an answer has a thought that data.thoughts does not read, since it is not at the beginning or not in <think> tags"
    ": it stays in the text"
)
"""Notes on answers."""

ENDED = (
    "the prompt of the chat template ends the thought before it begins, but the row has one. Set "
    "data.chat_template_kwargs={enable_thinking: true}, or take the thought out of the row."
)
DOUBLED = (
    "an empty thought would be trained before the one in the answer's text. Set data.thoughts=split: then this "
    "one takes its place."
)
UNENDED = (
    "the chat template ends a thought before the answer, whose text begins one that it never ends. End it in the row "
    "with </think>, or remove the row."
)


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
    found = inline_thought(message["content"]) if message["role"] == "assistant" else None
    if found is None or message.get("reasoning_content"):
        return message
    return {**message, "content": found[1], "reasoning_content": found[0].strip()}


def is_unread(message: Message) -> bool:
    """Whether the text of an answer that has been taken apart still begins a thought.

    >>> [is_unread({"role": "assistant", "content": text}) for text in ("Well. <think>Why?</think>", "<THINK>", "So.")]
    [True, True, False]
    """
    return message["role"] == "assistant" and _ANY_OPENING.search(message["content"]) is not None


def begin_of(text: str) -> int | None:
    r"""Where the thought at the beginning of a text begins, behind its tag.

    >>> begin_of("<think>Why?</think>So."), begin_of("Why?\n</think>So."), begin_of("So.")
    (7, 0, None)
    """
    if inline_thought(text) is None:
        return None
    begun = _BEGUN.match(text)
    return begun.end() if begun else 0


def form_of(message: Message) -> str:
    r"""How the text of an answer has a thought, with places for that and the rest; empty where it has none.

    >>> form_of({"role": "assistant", "content": "<think>Why?</think>So."})
    '<think>\n{}\n</think>\n\n{}'
    """
    if taken_apart(message) is message:
        return ""
    begun = _BEGUN.match(message["content"])
    tag = begun[1] if begun else "think"
    return f"<{tag}>\n{{}}\n</{tag}>\n\n{{}}" if begun else "{}\n</think>\n\n{}"


def check_after_empty_one(text: str) -> None:
    """Check the text of an answer that follows an empty thought.

    Raises:
        InputError: When it begins with a thought, too.
    """
    if begin_of(text) is not None and not EMPTY_THOUGHT.match(text):
        raise InputError(DOUBLED)
    if _BEGUN.match(text) and inline_thought(text) is None:
        raise InputError(UNENDED)
