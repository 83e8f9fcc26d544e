"""Rows of other kinds of training, refused by name with what can be done: preferences, KTO, trees, nested answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_sft.data.rows.values import shown
from lightning_sft.types import InputError

_TREE = ("parent_id", "message_tree_id")


def refuse_other_data(row: Mapping[str, Any], name: str | None, mapped: Iterable[str]) -> None:
    """Refuse a row that is not meant to be learned as it is.

    Args:
        row: The row.
        name: The format whose keys it has, if it has those of one.
        mapped: Columns that ``data.columns`` gives a meaning.

    Raises:
        InputError: When it is one of two answers to choose from, an answer with a verdict, a message of a tree, or
            nests its answers.

    >>> refuse_other_data({"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}, None, ())
    Traceback (most recent call last):
    ...
    lightning_sft.types.InputError: the row is a preference pair, ... learn the chosen answers: \
data.columns={completion: chosen}.
    """
    mapped = set(mapped)
    if _is_filled(row, "chosen", "rejected") and not mapped & {"chosen", "rejected"}:
        question = row.get("messages", row.get("conversations"))
        if name is None or name == "text" or question is None or question != row["chosen"]:
            raise InputError(
                "the row is a preference pair, with 'chosen' and 'rejected'. Fine-tuning can learn the chosen answers: "
                f"data.columns={{{_columns_of_chosen(row)}}}."
            )
    if name == "prompt-completion" and isinstance(row.get("label"), bool) and "label" not in mapped:
        raise InputError(
            f"'label' is {str(row['label']).lower()}: the row says whether its answer is wanted, as KTO's do. To learn "
            "those that are wanted: data.columns={weight: label} with data.invalid_rows=skip; to learn all: "
            "data.format=prompt-completion."
        )
    if (name is None or name == "text") and any(key in row for key in _TREE):
        raise InputError(
            "the row is a message of a conversation tree (or the tree), as OpenAssistant's are. Write one row of "
            "'messages' for each path from the first message to a last one."
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


def _is_filled(row: Mapping[str, Any], *keys: str) -> bool:
    return all(row.get(key) is not None for key in keys)


def _columns_of_chosen(row: Mapping[str, Any]) -> str:
    """What the chosen answer is: a whole conversation, an answer to what is in other columns, or a whole text."""
    chosen = row["chosen"]
    first = chosen[0] if isinstance(chosen, list) and chosen else None
    if isinstance(first, Mapping) and first.get("role", first.get("from")) not in ("assistant", "gpt"):
        return "messages: chosen"
    if "instruction" in row:
        return "output: chosen"
    question = next((key for key in ("prompt", "messages", "conversations", "question") if key in row), None)
    if question is None:
        return "text: chosen"
    return "completion: chosen" if question == "prompt" else f"prompt: {question}, completion: chosen"


def _are_messages(values: list[Any]) -> bool:
    if all(isinstance(value, Mapping) for value in values):
        return bool({"role", "from", "speaker"} & values[0].keys())
    return len(values) > 1 and all(isinstance(value, str) for value in values)
