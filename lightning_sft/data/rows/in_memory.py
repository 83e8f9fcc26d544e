"""Rows that a program has in memory: lists, data sets of torch, tables of pandas, tensors among the values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_sft.types import InputError

_SPLITS = {"train", "training", "validation", "valid", "val", "dev", "eval", "test"}
_PLAIN = {str, int, float, bool, list, dict, type(None)}


class ByIndex(Sequence[Any]):
    """The rows of a data set that has a length and gives a row by its index, as those of torch.

    Args:
        data: The data set.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        return [self.data[one] for one in range(len(self))[index]] if isinstance(index, slice) else self.data[index]

    def __iter__(self) -> Iterator[Any]:
        return map(self.data.__getitem__, range(len(self)))


def refuse_mapping(source: Mapping[Any, Any]) -> None:
    """Refuse a mapping in place of rows: the splits of a data set, or columns.

    Raises:
        InputError: Always, with how to give rows.
    """
    names = sorted(map(str, source))
    is_split = bool(_SPLITS & {name.lower() for name in names})
    if source and not is_split and all(isinstance(own, (list, tuple)) for own in source.values()):
        firsts = [own[0] for own in source.values() if own]
        if not any(isinstance(first, Mapping) for first in firsts):
            raise InputError(
                f"The data is a dictionary of columns, {names}, and rows are expected: give "
                "datasets.Dataset.from_dict(data), or [dict(zip(data, row)) for row in zip(*data.values())]."
            )
    raise InputError(f"The data has the splits {names}: give one of them, data['train'].")


def plain_row(row: Any) -> Any:
    """A row whose tensors and arrays are lists; any other as it is.

    >>> import numpy as np
    >>> plain_row({"input_ids": np.array([5, 6]), "text": "a"})
    {'input_ids': [5, 6], 'text': 'a'}
    """
    if type(row) is not dict or {*map(type, row.values())} <= _PLAIN:
        return row
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}
