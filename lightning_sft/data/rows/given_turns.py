"""The messages of a row as they were given, in order, whatever columns they are in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_sft.data.rows.formats import Found
from lightning_sft.data.rows.values import decoded, shown, text_of
from lightning_sft.types import InputError

Given = tuple[Any, bool]
"""A message as it was given, and whether it may be a target."""

_PAIRS = (("input", "output"), ("human", "assistant"), ("user", "assistant"))
_CONVERSATIONS = ("chat", "sharegpt")


def given_turns(found: Found) -> list[Given]:
    """The messages of a row whose format is known.

    Raises:
        InputError: When a column is not what its format says.
    """
    turns: list[Given] = [(message, False) for message in _system(found.optional.get("system"), found.named("system"))]
    if found.name in _CONVERSATIONS:
        return turns + [(message, True) for message in _conversation(found.question, found.question_column)]
    question, column = found.question, found.question_column
    turns += _history(found.optional.get("history"), found.named("history"))
    if found.name == "alpaca":
        texts = [text_of(question, column), text_of(found.optional.get("input", ""), found.named("input"))]
        question = "\n\n".join(text for text in texts if text.strip()) or question
    asked = _side(question, "user", column)
    turns += [(message, False) for message in asked]
    if found.has_answer:
        answered = _answers(found)
        if len(answered) > 1 and answered[0] == asked[0]:
            raise InputError(
                "the answer begins with the prompt's first message: it is a whole conversation. Take it alone with "
                "data.columns={messages: …}."
            )
        turns += [(message, True) for message in answered]
    return turns


def _system(system: Any, column: str) -> list[Any]:
    """The system prompt of a row: a text, parts, or a message."""
    if isinstance(system, Mapping):
        return [{**system, "role": "system"}]
    if system and not isinstance(system, list):
        text_of(system, column)
    return [{"role": "system", "content": system}] if system else []


def _answers(found: Found) -> list[Any]:
    if "answers" in found.answers:
        return [{"role": "tool_call", "content": found.answer}]
    answers = _side(found.answer, "assistant", found.answer_column)
    if (reasoning := found.optional.get("reasoning_content")) is not None:
        if len(answers) > 1 or not isinstance(answers[0], Mapping) or "reasoning_content" in answers[0]:
            raise InputError("'reasoning_content' of the row needs an answer of one message without its own. Keep one.")
        answers = [{**answers[0], "reasoning_content": reasoning}]
    return answers


def _history(history: Any, column: str) -> list[Given]:
    """Earlier exchanges, each a question and its answer."""
    if not history:
        return []
    pairs = decoded(history, column)
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise InputError(f"{column} must be a list of [question, answer], got {shown(pairs)}.")
    return [
        ({"role": role, "content": text}, True)
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _conversation(value: Any, column: str) -> list[Any]:
    """The messages of a conversation: a list of them or its JSON text, texts that take turns, or pairs."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = decoded(value, column)
    messages = _listed(value, column)
    if all(isinstance(message, str) for message in messages):
        if all(message.startswith('{"') for message in messages):
            return [decoded(message, column) for message in messages]
        roles = ("user", "assistant")
        return [{"role": roles[number % 2], "content": text} for number, text in enumerate(messages)]
    return [message for given in messages for message in _pair(given)]


def _pair(given: Any) -> list[Any]:
    """A message; or both of an exchange that is one object, as ``{"input": ..., "output": ...}``."""
    if not isinstance(given, Mapping) or "role" in given or "from" in given:
        return [given]
    keys = given.keys() - {"system"}
    pair = next((pair for pair in _PAIRS if keys == set(pair)), None)
    if pair is None:
        return [given]
    roles = zip(("system", "user", "assistant"), ("system", *pair), strict=True)
    return [{"role": role, "content": given[key]} for role, key in roles if key != "system" or given.get(key)]


def _side(value: Any, role: str, column: str) -> list[Any]:
    """One side of a prompt and its completion: a text, a message, or messages."""
    if isinstance(value, list):
        if value and not isinstance(value[0], Mapping):
            raise InputError(f"{column} must be a string, or a list of messages, got {shown(value)}.")
        return _listed(value, column)
    if isinstance(value, Mapping):
        return [value]
    return [{"role": role, "content": text_of(value, column)}]


def _listed(value: Any, column: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(
            f"{column} must be a list of {{'role', 'content'}} or {{'from', 'value'}}, got {shown(value)}."
        )
    return value
