"""A share of the training rows, held out for validation: chosen by their content, so that equal rows stay together."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from lightning_sft.types import Conversation, Example, InputError

_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
_BITS = 64


def share_of(val: Any, train: Any) -> float | None:
    """The share of the training data that ``data.val: 5%`` holds out; ``None`` where it is no percentage.

    Args:
        val: Validation data, as they were given.
        train: Training data.

    Raises:
        InputError: When it is not above 0 % and below 100 %, or there are no training data.

    >>> share_of("5%", "train.jsonl"), share_of("val.jsonl", "train.jsonl")
    (0.05, None)
    """
    found = _SHARE.fullmatch(val) if isinstance(val, str) else None
    if found is None:
        return None
    share = float(found[1]) / 100
    if not 0 < share < 1:
        raise InputError(f"data.val={val} is no share of the training data: give more than 0% and less than 100%.")
    if train is None:
        raise InputError(f"data.val={val} is a share of data.train, which is missing. Set it, or give validation data.")
    return share


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

    Args:
        share: Share of the rows that is held out.
        is_held_out: Whether it is the side of the rows that are held out.
    """

    share: float
    is_held_out: bool

    def has(self, row: Conversation | Example) -> bool:
        """Whether a row is on this side.

        >>> rows = [Conversation([{"role": "user", "content": str(i)}]) for i in range(1000)]
        >>> sum(Side(0.05, True).has(row) for row in rows), sum(Side(0.05, False).has(row) for row in rows)
        (60, 940)
        """
        if isinstance(row, Example):
            content: Any = list(map(int, row.input_ids))
        else:
            content = [row.messages, row.tools]
        text = json.dumps(content, sort_keys=True).encode()
        digest = int.from_bytes(hashlib.blake2b(text, digest_size=_BITS // 8).digest(), "big")
        return (digest < self.share * 2**_BITS) is self.is_held_out
