"""Rows to conversations: every format in the same normal form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from lightning_sft.data.rows.calls import read_tools
from lightning_sft.data.rows.dialects import COMMON, Dialect
from lightning_sft.data.rows.formats import Found, check_columns, find_format
from lightning_sft.data.rows.given_turns import Given, given_turns
from lightning_sft.data.rows.markup import without_media
from lightning_sft.data.rows.mixture import Part
from lightning_sft.data.rows.token_rows import read_tokens
from lightning_sft.data.rows.turns import Turn, read_turns
from lightning_sft.data.rows.values import check_json, check_weight, decoded, flag_of, shown, text_of, weight_of
from lightning_sft.io.arguments import check_arguments
from lightning_sft.types import Conversation, Example, InputError

TrainOn = Literal["all", "last", "prompts"]
"""Turns that are trained, which are all answers, the last answer alone, or answers and every other turn."""

_OF_PARTS = ("format", "columns", "system", "train_on")
_NO_VARIABLES = frozenset({"messages", "conversation", "tools", "add_generation_prompt", "tokenize", "chat_template"})

_AN_ARRAY = (
    "the row is a list of {:,} objects, none of them a message. If each of them is a row, the line is a JSON array: "
    "name the file .json, or give each of them a line."
)


@dataclass(frozen=True)
class Reading:
    """How the rows of a data set are read.

    Args:
        format: Format of all rows; by default inferred from the keys of each row.
        columns: The data's column for a key of the format, where it has another name.
        system: System prompt of conversations that have none.
        train_on: Target turns: ``all`` answers, the ``last`` one alone, or with ``prompts`` every other turn too.
        roles: Role (system, user, assistant or tool) for each name that the data have for one.
        message_keys: Key of a message for each name that the data have for one; ``ignored`` where it says nothing.
        chat_template_kwargs: Variables of the chat template for all rows, where a row does not set them.

    Raises:
        InputError: When an argument is not of its kind.
    """

    format: str | None = None
    columns: Mapping[str, str] | None = None
    system: str | None = None
    train_on: TrainOn = "all"
    roles: Mapping[str, str] | None = None
    message_keys: Mapping[str, str] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_arguments(Reading, vars(self), "data")
        check_columns(self.columns or {})
        assert self.dialect is not None

    def of(self, part: Part) -> Reading:
        """The same for a part of a mixture, which may override some of it."""
        own = {name: value for name in _OF_PARTS if (value := getattr(part, name)) is not None}
        variables = {**(self.chat_template_kwargs or {}), **(part.chat_template_kwargs or {})}
        return replace(self, **own, chat_template_kwargs=variables)

    @cached_property
    def dialect(self) -> Dialect:
        """The names of roles and keys of messages."""
        return Dialect(self.roles or {}, self.message_keys or {}) if self.roles or self.message_keys else COMMON


def to_conversation(
    row: Any,
    provenance: str = "?",
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    answered: bool = True,
    system: str | None = None,
    train_on: TrainOn = "all",
    roles: Mapping[str, str] | None = None,
    message_keys: Mapping[str, str] | None = None,
) -> Conversation:
    r"""A row of any known format as a conversation in which every assistant turn is a target.

    The messages are in the normal form of :mod:`lightning_sft.data.rows.turns`. A row of plain text is one message of
    the role ``text``. A turn of an assistant weighs 1 and any other 0, unless ``train_on`` or flags of the message
    (``loss``, ``train``, ``weight``, ``loss_weight``) say otherwise; assistant turns within a prompt are context. A
    ``weight`` of the row multiplies.

    Args:
        row: Row of the data in one of :data:`lightning_sft.data.rows.formats.FORMATS`; a list is its ``messages``.
        provenance: Location of the row, for error messages.
        format: Format of the row; by default inferred from its keys.
        columns: The row's column for a key of the format, where it has another name.
        answered: Whether the answer has to be there; it need not for generation.
        system: System prompt, where the row has none.
        train_on: Target turns, see :class:`Reading`.
        roles: Role for each name that the row has for one, beside the common names.
        message_keys: Key of a message for each name that the row has for one, beside the common names.

    Raises:
        InputError: When the row is of no known format, or of several, or not as its format says.

    >>> to_conversation({"instruction": "Add.", "input": "1 2", "output": "3"}).messages
    [{'role': 'user', 'content': 'Add.\n\n1 2'}, {'role': 'assistant', 'content': '3'}]
    """
    return Converter(Reading(format, columns, system, train_on, roles, message_keys), answered)(row, provenance)


class Converter:
    """Rows to conversations, where every file keeps to one format.

    Args:
        reading: How rows are read.
        answered: Whether answers have to be there.

    >>> convert = Converter()
    >>> convert({"prompt": "Hi", "completion": "Hello", "id": 7}, "a.jsonl:1").weights
    [0.0, 1.0]
    >>> convert.ignored
    Counter({'id': 1})
    """

    def __init__(self, reading: Reading | None = None, answered: bool = True) -> None:
        self.reading, self.answered = reading or Reading(), answered
        self.ignored: Counter[str] = Counter()  # how many rows have a key that means nothing
        self._first: dict[str, tuple[str, str]] = {}  # of each file: its format, and where that was seen

    def __call__(self, row: Any, provenance: str) -> Conversation:
        """The conversation of a row.

        Raises:
            InputError: When :func:`to_conversation` does, the row is of another format than its file, or has token ids
                instead of messages.
        """
        read = self.read(row, provenance)
        if isinstance(read, Example):
            raise InputError(f"{provenance}: a row of token ids has no messages. Give rows with texts.")
        return read

    def read(self, row: Any, provenance: str) -> Conversation | Example:
        """The conversation of a row, or its example where the row has token ids.

        Raises:
            InputError: When the row is not as its format says, or of another format than its file.
        """
        try:
            found = self._found(row)
            name, place = self._first.setdefault(_file(provenance), (found.name, provenance))
            if _file(provenance) and found.name != name:
                raise InputError(
                    f"the row is of the format {found.name}, but {place} is of {name}. Put them in files of their own, "
                    "or say which all rows have with data.format."
                )
            ignored = set(found.ignored)
            read = _read(found, self.reading, provenance, ignored)
        except InputError as error:
            why = _AN_ARRAY.format(len(row)) if self._is_array(row) else error
            raise InputError(f"{provenance}: {why}") from error
        self.ignored.update(ignored)
        return read

    def knows(self, provenance: str) -> bool:
        """Whether it has seen of which format the file of a row is; for a row of a list that does not matter."""
        return not _file(provenance) or _file(provenance) in self._first

    def learn(self, row: Any, provenance: str) -> None:
        """Take in the format of a row's file, if the row has one, and nothing else."""
        with suppress(InputError):
            self._first.setdefault(_file(provenance), (self._found(row).name, provenance))

    def _is_array(self, row: Any) -> bool:
        """Whether a row is a list of objects of which none may be a message: a file of one line of JSON."""
        names = self.reading.dialect.names["role"]
        return isinstance(row, list) and bool(row) and all(isinstance(e, Mapping) and not e.keys() & names for e in row)

    def _found(self, row: Any) -> Found:
        if isinstance(row, list):
            row = {"messages": row}
        if not isinstance(row, Mapping):
            raise InputError(f"a row must be an object with named keys, or a list of messages, got {shown(row)}.")
        return find_format(row, self.reading.format, self.reading.columns, self.answered)


def _file(provenance: str) -> str:
    """The file of a row; none for the rows of a list, which may differ in format."""
    return provenance.rpartition(":")[0]


def _read(found: Found, reading: Reading, provenance: str, ignored: set[str]) -> Conversation | Example:
    """A row whose format is known; ``ignored`` takes in what says nothing."""
    weight = found.optional.get("weight", 1.0)
    flag = None if isinstance(weight, float) else flag_of(weight)
    scale = weight_of(weight, found.named("weight")) if flag is None else float(flag)
    if found.name == "tokens":
        return read_tokens(found.question, found.answers, found.optional, scale, provenance)
    if found.name == "text":
        check_weight(scale, "the weight of the row")
        text = text_of(found.question, found.question_column)
        if not text.strip():
            raise InputError("the text is empty. Remove the row.")
        return Conversation([{"role": "text", "content": text}], weights=[scale], provenance=provenance)
    given = given_turns(found)
    if reading.format is not None:  # so the texts alone are meant
        given = [(without_media(message, found.ignored, ignored), is_target) for message, is_target in given]
    turns = _turns(given, reading.dialect, ignored)
    messages = [message for (message, _), _ in turns]
    weights = [weight * scale for weight in _weights(turns, reading.train_on)]
    for turn, weight in enumerate(weights, 1):
        check_weight(weight, f"turn {turn}: its weight times that of the row")
    if "system" in found.optional and [m["role"] for m in messages[:2]] == ["system", "system"]:
        raise InputError("the system text is there twice: in 'system' and as a turn. Keep one.")
    if reading.system is not None and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": reading.system})
        weights.insert(0, scale * (reading.train_on == "prompts"))
    tools, own = read_tools(found.optional.get("tools")), _variables(found.optional.get("chat_template_kwargs"))
    return Conversation(messages, tools, weights, provenance, {**(reading.chat_template_kwargs or {}), **own})


def _turns(given: Sequence[Given], dialect: Dialect, ignored: set[str]) -> list[tuple[Turn, bool]]:
    """The turns in the normal form, each with whether it may be a target."""
    turns: list[tuple[Turn, bool]] = []
    for number, (message, is_target) in enumerate(given, 1):
        try:
            turns += [(turn, is_target) for turn in read_turns(message, dialect, ignored)]
        except InputError as error:
            raise InputError(f"turn {number}: {error}") from error
    return turns


def _weights(turns: Sequence[tuple[Turn, bool]], train_on: TrainOn) -> list[float]:
    """The weight of each turn before that of the row; flags of a message decide over what is a target by default."""
    weights = []
    for (message, flag), is_target in turns:
        is_answer = is_target and message["role"] == "assistant"
        weights.append(float(is_answer or train_on == "prompts") if flag is None else flag)
    if train_on == "last":
        answers = [number for number, ((message, _), _) in enumerate(turns) if message["role"] == "assistant"]
        weights = [weight if number in answers[-1:] else 0.0 for number, weight in enumerate(weights)]
    return weights


def _variables(given: Any) -> dict[str, Any]:
    """The row's variables for the chat template, from an object or its JSON text."""
    variables = decoded(given, "'chat_template_kwargs'") if given else {}
    if not isinstance(variables, dict):
        raise InputError(f"'chat_template_kwargs' must be an object, or the JSON text of one, got {shown(variables)}.")
    check_json(variables, "'chat_template_kwargs'")
    if reserved := sorted(_NO_VARIABLES & variables.keys()):
        raise InputError(f"'chat_template_kwargs' sets {reserved[0]!r}, which is set for each row. Remove it.")
    return variables
