"""A share of the training rows, held out for validation: chosen by their content, so that equal rows stay together."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from lightning_sft.data.rows.messages import Converter, Reading
from lightning_sft.data.rows.mixture import Part
from lightning_sft.data.rows.sources import leaves, parsed
from lightning_sft.types import Conversation, Example, InputError

_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
_BITS = 64


def share_of(val: Any, train: Any) -> float | None:
    """The share of the training data that ``data.val: 5%`` holds out; ``None`` where it is no percentage.

    Args:
        val: Validation data, as they were given.
        train: Training data.

    Raises:
        InputError: When it is not above 0 % and below 100 %, is a number without the sign, or there are no training
            data.

    >>> share_of("5%", "train.jsonl"), share_of("val.jsonl", "train.jsonl")
    (0.05, None)
    """
    found = _SHARE.fullmatch(val) if isinstance(val, str) else None
    if found is None:
        _check_is_no_number(val)
        return None
    share = float(found[1]) / 100
    if not 0 < share < 1:
        raise InputError(f"data.val={val} is no share of the training data: give more than 0% and less than 100%.")
    if train is None:
        raise InputError(f"data.val={val} is a share of data.train, which is missing. Set it, or give validation data.")
    return share


def _check_is_no_number(val: Any) -> None:
    """Refuse a share, or a number of rows, that is no percentage, and that no file is called."""
    try:
        number = float(val) if isinstance(val, (int, float, str)) and not isinstance(val, bool) else None
    except ValueError:
        return
    if number is not None and not (isinstance(val, str) and Path(val).exists()):
        share = 100 * number if 0 < number < 1 else number
        example = f"{share:g}%" if 0 < share < 100 else "10%"
        raise InputError(
            f"data.val is {val!r}; expected a percentage, as {example!r}, for a share of the training data, or "
            "validation data."
        )


def side_of(split: str, share: float | None) -> Side | None:
    """The rows that a split has of the training data; ``None`` where it has all, or other data.

    Args:
        split: Name of the split.
        share: Share that is held out for ``val``, if any.
    """
    return Side(share, split == "val") if share is not None and split in ("train", "val") else None


@dataclass(frozen=True)
class Side:
    """One side of training data of which a share is held out.

    A row's side depends on its messages and tools alone: not on its place, the other rows, or what else it says of
    itself. So it stays where it is when the file is shuffled or grows, and a row that is there twice is on one side.
    Only where so few rows are all on one side, :meth:`within` puts one on the other.

    Args:
        share: Share of the rows that is held out.
        is_held_out: Whether it is the side of the rows that are held out.
        bound: Digest below which rows are held out; by default that of the share.
    """

    share: float
    is_held_out: bool
    bound: int | None = None

    def has(self, row: Conversation | Example) -> bool:
        """Whether a row is on this side.

        >>> rows = [Conversation([{"role": "user", "content": str(i)}]) for i in range(1000)]
        >>> sum(Side(0.05, True).has(row) for row in rows), sum(Side(0.05, False).has(row) for row in rows)
        (60, 940)
        """
        bound = self.share * 2**_BITS if self.bound is None else self.bound
        return (_digest(row) < bound) is self.is_held_out

    def within(self, part: Part, reading: Reading) -> Side:
        """The same for a data set that may be so small that all its rows would be on one side.

        Then the row of the lowest digest is held out, or that of the highest is not. To know, rows are read until there
        is one on each side: of large data, the first few.

        Args:
            part: The data set.
            reading: How its rows are read.

        Raises:
            InputError: When all rows are equal, or can be read once alone.
        """
        if isinstance(part.source, Iterator):
            raise InputError(f"{self} needs rows that can be read twice, got an iterator. Give a list or a file.")
        lowest, highest = 1 << _BITS, -1
        for digest in map(_digest, _usable(part, reading)):
            lowest, highest = min(lowest, digest), max(highest, digest)
            if lowest < self.share * 2**_BITS <= highest:
                return self
        if highest < 0:  # no row can be used, which its split will say
            return self
        if lowest == highest:
            raise InputError(
                f"{self} of the training data cannot be held out: they are one row, or equal ones. Give validation "
                "data of their own."
            )
        return replace(self, bound=lowest + 1 if lowest >= self.share * 2**_BITS else highest)

    def __str__(self) -> str:
        return f"data.val={100 * self.share:g}%"


def _usable(part: Part, reading: Reading) -> Iterator[Conversation | Example]:
    convert = Converter(reading)
    for row, place in islice((row for leaf in leaves(part.source) for row in leaf()), part.first):
        with suppress(InputError):  # the split that has it will say so
            yield convert.read(parsed(row, place), place)


def _digest(row: Conversation | Example) -> int:
    """A number of a row's content, below ``2 ** _BITS``."""
    content: Any = list(map(int, row.input_ids)) if isinstance(row, Example) else [row.messages, row.tools]
    text = json.dumps(content, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=_BITS // 8).digest(), "big")
