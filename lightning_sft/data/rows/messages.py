"""Rows to conversations: every format in the same normal form."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lightning_sft.data.rows.formats import Found, find_format
from lightning_sft.data.rows.turns import read_tools, read_turn, shown, text_of, weight_of
from lightning_sft.types import Conversation, InputError, Message


def to_conversation(
    row: Any,
    provenance: str = "?",
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    answered: bool = True,
) -> Conversation:
    r"""A row of any known format as a conversation in which every assistant turn is a target.

    The messages are in the normal form of :mod:`lightning_sft.data.rows.turns`. A row of plain text is one message of
    the role ``text``. A turn of an assistant weighs 1 and any other 0, unless flags of the message (``loss``,
    ``train``, ``weight``, ``loss_weight``) say otherwise; assistant turns within a prompt are context. A ``weight`` of
    the row multiplies.

    Args:
        row: Row of the data in one of :data:`lightning_sft.data.rows.formats.FORMATS`; a list is its ``messages``.
        provenance: Location of the row, for error messages.
        format: Format of the row; by default inferred from its keys.
        columns: The row's column for a key of the format, where it has another name.
        answered: Whether the answer has to be there; it need not for generation.

    Raises:
        InputError: When the row is of no known format, or of several, or not as its format says.

    >>> to_conversation({"instruction": "Add.", "input": "1 2", "output": "3"}).messages
    [{'role': 'user', 'content': 'Add.\n\n1 2'}, {'role': 'assistant', 'content': '3'}]
    """
    try:
        return _conversation(_find(row, format, columns, answered), provenance)
    except InputError as error:
        raise InputError(f"{provenance}: {error}") from error


class Converter:
    """Rows to conversations, where every file keeps to one format.

    Args:
        format: Format of all rows; by default inferred from the keys of each row.
        columns: The data's column for a key of the format, where it has another name.
        answered: Whether answers have to be there.

    >>> convert = Converter()
    >>> convert({"prompt": "Hi", "completion": "Hello", "id": 7}, "a.jsonl:1").weights
    [0.0, 1.0]
    >>> convert.ignored
    Counter({'id': 1})
    """

    def __init__(
        self, format: str | None = None, columns: Mapping[str, str] | None = None, answered: bool = True
    ) -> None:
        self.format, self.columns, self.answered = format, columns, answered
        self.ignored: Counter[str] = Counter()  # how many rows have a key that means nothing
        self._first: dict[str, tuple[str, str]] = {}  # of each file: its format, and where that was seen

    def __call__(self, row: Any, provenance: str) -> Conversation:
        """The conversation of a row.

        Raises:
            InputError: When :func:`to_conversation` does, or the row is of another format than its file.
        """
        try:
            found = _find(row, self.format, self.columns, self.answered)
            name, place = self._first.setdefault(_file(provenance), (found.name, provenance))
            if _file(provenance) and found.name != name:
                raise InputError(
                    f"the row is of the format {found.name}, but {place} is of {name}. Put them in files of their own, "
                    "or say which all rows have with data.format."
                )
            self.ignored.update(found.ignored)
            return _conversation(found, provenance)
        except InputError as error:
            raise InputError(f"{provenance}: {error}") from error

    def knows(self, provenance: str) -> bool:
        """Whether it has seen of which format the file of a row is; for a row of a list that does not matter."""
        return not _file(provenance) or _file(provenance) in self._first

    def learn(self, row: Any, provenance: str) -> None:
        """Take in the format of a row's file, if the row has one, and nothing else."""
        with suppress(InputError):
            self._first.setdefault(
                _file(provenance), (_find(row, self.format, self.columns, self.answered).name, provenance)
            )


def _file(provenance: str) -> str:
    """The file of a row; none for the rows of a list, which may differ in format."""
    return provenance.rpartition(":")[0]


def _find(row: Any, named: str | None, columns: Mapping[str, str] | None, answered: bool) -> Found:
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise InputError(f"a row must be an object with named keys, or a list of messages, got {shown(row)}.")
    return find_format(row, named, columns, answered)


def _conversation(found: Found, provenance: str) -> Conversation:
    scale = weight_of(found.optional.get("weight", 1.0), "'weight'")
    if found.name == "text":
        text = text_of(found.question, "'text'")
        if not text.strip():
            raise InputError("the text is empty. Remove the row.")
        return Conversation([{"role": "text", "content": text}], weights=[scale], provenance=provenance)
    messages: list[Message] = []
    weights: list[float] = []
    for turn, (given, is_target) in enumerate(_turns(found), 1):
        try:
            message, flag = read_turn(given)
        except InputError as error:
            raise InputError(f"turn {turn}: {error}") from error
        if flag is None:
            flag = float(is_target and message["role"] == "assistant")
        if not math.isfinite(flag * scale):
            raise InputError(f"turn {turn}: its weight times that of the row is too large a number.")
        messages.append(message)
        weights.append(flag * scale)
    if "system" in found.optional and [m["role"] for m in messages[:2]] == ["system", "system"]:
        raise InputError("the system text is there twice: in 'system' and as a turn. Keep one.")
    return Conversation(messages, read_tools(found.optional.get("tools")), weights, provenance)


def _turns(found: Found) -> list[tuple[Any, bool]]:
    """The messages as they were given, each with whether it may be a target."""
    system = found.optional.get("system")
    turns = [({"role": "system", "content": text_of(system, "'system'")}, False)] if system else []
    if found.name in ("chat", "sharegpt"):
        key = "messages" if found.name == "chat" else "conversations"
        return turns + [(message, True) for message in _listed(found.question, key)]
    question = found.question
    if found.name == "alpaca":
        question = text_of(question, "'instruction'")
        if found.optional.get("input"):
            question += "\n\n" + text_of(found.optional["input"], "'input'")
    turns += [(message, False) for message in _side(question, "user", "prompt")]
    if found.has_answer:
        turns += [(message, True) for message in _side(found.answer, "assistant", "completion")]
    return turns


def _side(value: Any, role: str, key: str) -> list[Any]:
    """One side of a prompt and its completion: a text, or messages."""
    if isinstance(value, list):
        return _listed(value, key)
    return [{"role": role, "content": text_of(value, repr(key))}]


def _listed(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{key!r} must be a list of {{'role', 'content'}} or {{'from', 'value'}}, got {shown(value)}.")
    return value
