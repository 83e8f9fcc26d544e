"""Rows of other kinds of training, refused by name with what can be done: preferences, KTO, trees, nested answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_sft.data.rows.markup import MEDIA_COLUMNS
from lightning_sft.data.rows.values import flag_of, shown
from lightning_sft.types import InputError

_OF_PAIRS = ("chosen", "reject")
_TREE = ("parent_id", "message_tree_id")
_VERDICTS = ("label", "kto_tag")
_FLAGS = ("loss", "train")  # of a message, and true or false
_CONTEXTS = ("context", "contexts", "documents", "passage", "passages")  # of a question
_TELLING = frozenset((*_VERDICTS, *_FLAGS, *_CONTEXTS, *MEDIA_COLUMNS))  # of a row that has the keys of a format
_WITHOUT_CONTEXT = {"prompt-completion": ("prompt", "completion"), "query": ("query", "response")}


def refuse_other_data(row: Mapping[str, Any], name: str | None, columns: Mapping[str, str]) -> None:
    """Refuse a row that is not meant to be learned as it is.

    Args:
        row: The row.
        name: The format whose keys it has, if it has those of one.
        columns: The row's column for a key of the format, where it has another name.

    Raises:
        InputError: When it is one of two answers to choose from, an answer with a verdict, a row with a flag, a
            question whose context would be left out, a message of a tree, or nests its answers.

    >>> refuse_other_data({"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}, None, {})
    Traceback (most recent call last):
    ...
    lightning_sft.types.InputError: the row is a preference pair, with 'chosen' and 'rejected'. To learn the chosen \
answers: data.columns={completion: chosen}.
    """
    if name is not None and name != "text" and not any(key in _TELLING or str(key)[:6] in _OF_PAIRS for key in row):
        return
    mapped = set(columns.values())
    chosen = next((key for key in row if _is_chosen(row, key) and not mapped & {key, _rejected(key)}), None)
    question = row.get("messages", row.get("conversations"))
    if chosen is not None and (name is None or question is None or question != row[chosen]):
        raise InputError(
            f"the row is a preference pair, with {chosen!r} and {_rejected(chosen)!r}. To learn the chosen answers: "
            f"data.columns={{{_columns_of_chosen(row, chosen)}}}."
        )
    rejected = next((key for key in row if str(key)[:8] == "rejected" and row[key]), None)
    if name not in (None, "text", "tokens") and rejected is not None and _chosen(rejected) not in row:
        raise InputError(
            f"the row is a preference pair: {rejected!r} has the answer that is not wanted. To learn the other one: "
            f"data.format={name}."
        )
    verdict = next((key for key in _VERDICTS if _is_verdict(row.get(key)) and key not in mapped), None)
    if name not in (None, "text", "tokens") and verdict is not None:
        raise InputError(
            f"{verdict!r} is {row[verdict]}: the row says whether its answer is wanted, as KTO's do. To "
            f"learn the wanted ones: data.columns={{weight: {verdict}}} with data.invalid_rows=skip; to learn all: "
            f"data.format={name}."
        )
    flag = next((key for key in _FLAGS if flag_of(row.get(key)) is not None and key not in mapped), None)
    if name is not None and flag is not None:
        raise InputError(
            f"{flag!r} is {row[flag]}: the row says whether it is to be learned. To go by it: data.columns="
            f"{{weight: {flag}}} with data.invalid_rows=skip; to learn all rows: data.format={name}."
        )
    context = next((key for key in _CONTEXTS if row.get(key) and key not in mapped), None)
    if context is not None and name in _WITHOUT_CONTEXT:
        question, answer = (columns.get(key, key) for key in _WITHOUT_CONTEXT[name])
        raise InputError(
            f"the row has a {context!r}, for which {name} has no place: {shown(row[context])}. To show it to the "
            f"model, read the row as alpaca: data.columns={{instruction: {question}, input: {context}, output: "
            f"{answer}}}. To leave it out: data.format={name}."
        )
    if name is not None and (media := next((key for key in MEDIA_COLUMNS if row.get(key)), None)) is not None:
        raise InputError(
            f"the row has {media!r}, and only texts can be trained on. To leave such rows out: "
            f"data.invalid_rows=skip. To learn their texts without them: data.format={name}."
        )
    if any(key in row for key in _TREE) and (name is None or (name == "text" and "role" in row)):
        raise InputError(
            "the row is a message of a conversation tree (or the tree), as OpenAssistant's are. Write one row of "
            "'messages' for each path from the first message to a last one. To learn each message as a text: "
            "data.format=text."
        )
    if name is not None:
        return
    if "instances" in row:
        raise InputError(
            "the row nests its answers in 'instances', which is not read. Write one row for each of them, with "
            "'instruction', 'input' and 'output'."
        )
    if "input_ids" in row:
        raise InputError(
            "the row has 'input_ids', but nothing says which of them to learn. Add 'labels' (-100 where the model is "
            "not to learn), or a mask: 'assistant_masks', 'completion_mask' or 'loss_mask'."
        )
    for key, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], (Mapping, str)) and _are_messages(value):
            raise InputError(
                f"no column of the row has a known name, but {str(key)!r} looks like messages: {shown(value[0])}. "
                f"If it is the conversation: data.columns={{messages: {key}}}."
            )


def _is_verdict(value: Any) -> bool:
    """Whether it says yes or no, also as a number, as tables have it."""
    return flag_of(value) is not None or (isinstance(value, (int, float)) and value in (0, 1))


def _rejected(chosen: str) -> str:
    return chosen.replace("chosen", "rejected", 1)


def _chosen(rejected: str) -> str:
    return rejected.replace("rejected", "chosen", 1)


def _is_chosen(row: Mapping[str, Any], key: Any) -> bool:
    """Whether it is the answer of a pair; scores of answers are none."""
    is_named = isinstance(key, str) and key.startswith("chosen")
    return is_named and all(isinstance(row.get(name), (str, list, Mapping)) for name in (key, _rejected(key)))


def _columns_of_chosen(row: Mapping[str, Any], key: str) -> str:
    """What the chosen answer is: a whole conversation, an answer to what is in other columns, or a whole text."""
    first = row[key][0] if isinstance(row[key], list) and row[key] else None
    if isinstance(first, Mapping) and first.get("role", first.get("from")) not in ("assistant", "gpt"):
        return f"messages: {key}"
    if "instruction" in row:
        return f"output: {key}"
    question = next((own for own in ("prompt", "messages", "conversations", "question") if own in row), None)
    if question is None:
        return f"text: {key}"
    return f"completion: {key}" if question == "prompt" else f"prompt: {question}, completion: {key}"


def _are_messages(values: list[Any]) -> bool:
    if all(isinstance(value, Mapping) for value in values):
        return bool({"role", "from", "speaker"} & values[0].keys())
    return len(values) > 1 and all(isinstance(value, str) for value in values)
