"""The formats of instruction data, inferred from the keys of a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lightning_sft.data.rows.other_data import refuse_other_data
from lightning_sft.io.closest import did_you_mean
from lightning_sft.types import InputError

FormatName = Literal["chat", "sharegpt", "prompt-completion", "alpaca", "query", "text", "tokens"]


@dataclass(frozen=True)
class Format:
    """Which keys a row of this format has.

    Args:
        question: The key that tells the format, with the prompt or the whole conversation.
        answers: The names that the answer's key may have; none where the question has everything.
        optional: Keys that may be there. Every format may have a ``weight``.
        all_answers: Whether a row may have several of the answers, as it may have labels and a mask.
    """

    question: str
    answers: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    all_answers: bool = False

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.question, " or ".join(self.answers))))


_OF_CHAT = ("system", "tools", "chat_template_kwargs")
MASKS = ("labels", "assistant_masks", "completion_mask", "loss_mask")

FORMATS: dict[str, Format] = {
    "chat": Format("messages", (), _OF_CHAT),
    "sharegpt": Format("conversations", (), _OF_CHAT),
    "prompt-completion": Format("prompt", ("completion",), ("reasoning_content", *_OF_CHAT)),
    "alpaca": Format("instruction", ("output", "response"), ("input", "history", "reasoning_content", *_OF_CHAT)),
    "query": Format("query", ("response", "answers"), ("history", *_OF_CHAT)),
    "text": Format("text"),
    "tokens": Format("input_ids", MASKS, ("attention_mask", "position_ids"), all_answers=True),
}
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "messages": ("conversation", "dialogue", "dialog", "contents"),
    "input": ("context",),
    "system": ("system_prompt", "system_message", "systemInstruction"),
    "tools": ("functions",),
    "weight": ("loss_weight", "sample_weight"),
}
"""Columns that are read as a key of a format where the row does not have that key."""

_QUESTIONS = (
    *("prompt", "question", "query", "problem", "instruction", "input", "inputs", "request", "source", "text"),
    *("user", "human", "q"),
)
_ANSWERS = (
    *("completion", "answer", "response", "solution", "output", "reply", "target", "targets", "label"),
    *("assistant", "gpt", "bot", "a"),
)
_OTHERS = frozenset(name for names in OTHER_NAMES.values() for name in names)
_KEYS = frozenset({"weight"}).union(*((f.question, *f.answers, *f.optional) for f in FORMATS.values()))


@dataclass(frozen=True)
class Found:
    """A row whose format is known.

    Args:
        name: Name of the format.
        question: The value of its question's key.
        answers: The values of its answers' keys: one, or none where there is no answer, or several of token ids.
        optional: The values of its optional keys that are there and not null.
        ignored: The keys of the row that mean nothing in its format.
        columns: The row's column for each key of the format.
    """

    name: str
    question: Any
    answers: Mapping[str, Any]
    optional: Mapping[str, Any]
    ignored: frozenset[str]
    columns: Mapping[str, str] = field(default_factory=dict)

    def named(self, key: str) -> str:
        """What a key of the format is called in the row, in quotes.

        >>> find_format({"instruction": "Hi", "context": "x", "output": "Yo"}).named("input")
        "'context'"
        """
        return repr(self.columns.get(key, key))

    @property
    def question_column(self) -> str:
        """What the question's key is called in the row, in quotes."""
        return self.named(FORMATS[self.name].question)

    @property
    def answer_column(self) -> str:
        """What the answer's key is called in the row, in quotes."""
        return self.named(next(iter(self.answers), "completion"))

    @property
    def has_answer(self) -> bool:
        """Whether the row has an answer's key."""
        return bool(self.answers)

    @property
    def answer(self) -> Any:
        """The value of its answer's key, or ``None`` where there is none."""
        return next(iter(self.answers.values()), None)


def find_format(
    row: Mapping[str, Any],
    named: str | None = None,
    columns: Mapping[str, str] | None = None,
    answered: bool = True,
) -> Found:
    """The one format whose keys a row has.

    Args:
        row: The row.
        named: Name of the format; by default inferred from the keys.
        columns: The row's column for a key of the format, where it has another name.
        answered: Whether the answer has to be there.

    Raises:
        InputError: When it is none, or more than one, or has two answers, or is data of another kind of training.

    >>> find_format({"question": "1 + 1?", "answer": "2"}, columns={"prompt": "question", "completion": "answer"}).name
    'prompt-completion'
    """
    columns = columns or {}
    check_columns(columns)
    if named is not None and named not in FORMATS:
        raise InputError(f"data.format={named} is no format. Expected one of {', '.join(get_args(FormatName))}.")
    where = _columns_of(row, columns)
    here = {key: row[column] for key, column in where.items()}
    name = _name(here, row, named, columns, answered)
    form = FORMATS[name]
    answers = [key for key in form.answers if key in here and (key in columns or not columns.keys() & form.answers)]
    if form.all_answers:
        answers = [key for key in answers if here[key] is not None]
    elif len(answers) > 1:
        answers = [key for key in answers if here[key] is not None] or answers[:1]
        if len(answers) > 1:
            raise InputError(
                f"the row has both {answers[0]!r} and {answers[1]!r}. Say which is the answer: "
                f"data.columns={{{answers[0]}: {answers[0]}}} or {{{answers[0]}: {answers[1]}}}."
            )
    if not answered:
        answers = [key for key in answers if here[key] is not None]
    optional = {key: here[key] for key in (*form.optional, "weight") if here.get(key) is not None}
    used = {where.get(key) for key in (form.question, *answers, *form.optional, "weight")}
    ignored = frozenset(str(key) for key, value in row.items() if key not in used and value is not None)
    return Found(name, here[form.question], {key: here[key] for key in answers}, optional, ignored, where)


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuse a column for what is no key of a format.

    Args:
        columns: Column of the data for each key.

    Raises:
        InputError: When there is such a column.
    """
    if unknown := sorted(columns.keys() - _KEYS):
        raise InputError(
            f"data.columns={dict(columns)}: {unknown[0]!r} is no key of a format. Give the format's key first and the "
            f"data's column second; keys are {', '.join(sorted(_KEYS))}.{did_you_mean(unknown, _KEYS)}"
        )


def likely_columns(keys: Iterable[str]) -> dict[str, str] | None:
    """The columns of question and answer, guessed from their names; ``None`` if there are none.

    >>> likely_columns(["id", "question", "answer"])
    {'prompt': 'question', 'completion': 'answer'}
    """
    of_name = {key.lower(): key for key in keys}
    question = next((of_name[name] for name in _QUESTIONS if name in of_name), None)
    answer = next((of_name[name] for name in _ANSWERS if name in of_name), None)
    return {"prompt": question, "completion": answer} if question and answer else None


def _columns_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """The row's column for each key of a format that it has."""
    where = {key: key for key in row if key in _KEYS}
    if columns:
        for column in columns.values():  # one that is another key is not the key of its own name
            where.pop(column, None)
        where = {key: column for key, column in where.items() if key not in columns}
        where |= {key: column for key, column in columns.items() if column in row}
    if _OTHERS.isdisjoint(row):
        return where
    for key, names in OTHER_NAMES.items():
        if key in columns:
            continue
        filled = [name for name in names if row.get(name) not in (None, "") and name not in columns.values()]
        if filled and key in where and row[where[key]] not in (None, ""):
            raise InputError(
                f"the row has both {key!r} and {filled[0]!r}. Say which is meant: data.columns={{{key}: {key}}} or "
                f"{{{key}: {filled[0]}}}."
            )
        if filled:
            where[key] = filled[0]
    return where


def _name(
    here: Mapping[str, Any], row: Mapping[str, Any], named: str | None, columns: Mapping[str, str], answered: bool
) -> str:
    with_columns = f" with data.columns={dict(columns)}" if columns else ""
    if named is not None:
        form = FORMATS[named]
        if form.question not in here or not _has(form, here, answered):
            raise InputError(f"the keys {_sorted(row)} are not those of {named}: {form}{with_columns}.")
        return named
    filled = {key for key, value in here.items() if value is not None}
    found: list[str] = []
    everything = set(here)
    for asked, keys, complete in (  # a null is a value only where nothing else is
        *((filled, filled, True), (filled, everything, True), (filled, filled, answered)),
        *((everything, filled, True), (everything, everything, True), (everything, everything, answered)),
    ):
        if found := [n for n, form in FORMATS.items() if form.question in asked and _has(form, keys, complete)]:
            break
    if len(found) > 1 and "text" in found:  # beside messages or columns, it is what a template made of them
        found.remove("text")
    if len(found) < 2 and (answered or not found):
        refuse_other_data(row, found[0] if found else None, columns)
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"the keys {_sorted(row)} are of several formats at once: {' and '.join(found)}. "
            "Say which with data.format."
        )
    if missing := [column for column in columns.values() if column not in row]:
        raise InputError(
            f"the row has no {' and no '.join(map(repr, missing))}, which data.columns={dict(columns)} names; its keys "
            f"are {_sorted(row)}.{did_you_mean(missing, map(str, row))}"
        )
    nested = next((key for key, value in row.items() if _is_rows(value)), None)
    if nested is not None:
        raise InputError(
            f"the row has its rows in {nested!r}: {len(row[nested]):,} objects, of which each seems to be a row. Write "
            "them alone: a file of JSON has a list of rows, or a row on each line."
        )
    expected = "; ".join(f"{name}: {form}" for name, form in FORMATS.items())
    likely = likely_columns(map(str, row)) or {"prompt": "question", "completion": "answer"}
    mapped = ", ".join(f"{key}: {column}" for key, column in likely.items())
    raise InputError(
        f"the keys {_sorted(row)} are of no known format{with_columns}. Map the columns, as in "
        f"data.columns={{{mapped}}}, or give the keys of a format: {expected}."
    )


def _is_rows(value: Any) -> bool:
    """Whether a column is a list of rows, as of a file of JSON that has a list below a key."""
    if not isinstance(value, list) or not value or not all(isinstance(one, Mapping) for one in value):
        return False
    keys = {str(key) for key in value[0]}
    return likely_columns(keys) is not None or any(form.question in keys for form in FORMATS.values())


def _has(form: Format, keys: Iterable[str], answered: bool) -> bool:
    """Whether there is an answer among some keys, or else the question of a format without answers."""
    if not form.answers:
        return form.question in keys
    return not answered or any(key in keys for key in form.answers)


def _sorted(keys: Iterable[Any]) -> list[str]:
    names = sorted(map(str, keys))
    return names if len(names) <= 12 else [*names[:12], f"... and {len(names) - 12} more"]
