"""Rows to conversations: the formats that instruction data comes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_sft.types import Conversation, InputError, Message

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Format:
    """Which keys a row of this format has: the question and the answer in chosen columns, or all in ``messages``."""

    question: str
    answer: str | None
    optional: frozenset[str] = frozenset()


FORMATS = {
    "chat": Format("messages", None),
    "prompt-completion": Format("prompt", "completion", frozenset({"system"})),
    "alpaca": Format("instruction", "output", frozenset({"input", "system"})),
}


def to_conversation(row: Mapping[str, Any], provenance: str = "?", *, answered: bool = True) -> Conversation:
    r"""A row of any known format as a conversation in which every assistant turn is a target.

    Args:
        row: Chat (``messages``), prompt-completion (``prompt``, ``completion``) or Alpaca (``instruction``, ``input``,
            ``output``); the last two may have a ``system`` text.
        provenance: Where the row came from, for error messages.
        answered: Whether the answer has to be there; it need not for generation.

    Raises:
        InputError: When the row is of no known format, or of several, or a text is not a string.

    >>> to_conversation({"instruction": "Add.", "input": "1 2", "output": "3"}).messages
    [{'role': 'user', 'content': 'Add.\n\n1 2'}, {'role': 'assistant', 'content': '3'}]
    """
    form = format_of(row, provenance, answered=answered)
    if form.answer is None:
        messages = row[form.question]
    else:
        question = _text(row[form.question], repr(form.question), provenance)
        if row.get("input"):
            question += "\n\n" + _text(row["input"], "'input'", provenance)
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        answer = [{"role": "assistant", "content": row[form.answer]}] if form.answer in row else []
        messages = [*system, {"role": "user", "content": question}, *answer]
    checked = _checked(messages, provenance)
    weights = [1.0 if message["role"] == "assistant" else 0.0 for message in checked]
    return Conversation(checked, weights=weights, provenance=provenance)


def format_of(row: Mapping[str, Any], provenance: str = "?", *, answered: bool = True) -> Format:
    """The one format whose keys the row has.

    Raises:
        InputError: When it is none, or more than one.
    """
    found = [f for f in FORMATS.values() if f.question in row and (f.answer is None or f.answer in row or not answered)]
    if len(found) != 1:
        given = "of several formats at once" if found else "of no known format"
        expected = "; ".join(f"{n}: {', '.join(filter(None, (f.question, f.answer)))}" for n, f in FORMATS.items())
        raise InputError(f"{provenance}: the keys {sorted(row)} are {given}. Expected {expected}.")
    return found[0]


def ignored_keys(row: Mapping[str, Any]) -> set[str]:
    """The keys of a row that have no meaning in its format: they are counted and said, never used."""
    form = format_of(row)
    return row.keys() - {form.question, form.answer} - form.optional


def _checked(messages: Any, provenance: str) -> list[Message]:
    expected = "a list of {'role', 'content'}"
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{provenance}: 'messages' must be {expected}, got {_shown(messages)}.")
    for turn, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
            raise InputError(f"{provenance}: 'messages' must be {expected}, but turn {turn} is {_shown(message)}.")
        if message["role"] not in _ROLES:
            raise InputError(f"{provenance}: turn {turn} has the role {message['role']!r}, expected one of {_ROLES}.")
        _text(message["content"], f"the content of turn {turn} ({message['role']})", provenance)
    return [dict(message) for message in messages]


def _text(value: Any, what: str, provenance: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{provenance}: {what} must be a string, got {_shown(value)}.")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
