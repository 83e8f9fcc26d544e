"""What became of rows that are not trained on as they are: counted, with their places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

_LISTED = 5  # rows named in a message


@dataclass
class Account:
    """An account of the rows of a source.

    Args:
        num_rows: Rows read.
        refused: One reason a row that cannot be used, with ``file:line``.
        too_long: ``file:line`` and length of each sequence left out because it is longer than ``max_length``.
        cut: The same of those that were truncated or split.
        ignored: How many rows have a key that means nothing.
        shortest: Tokens of the shortest sequence, before any was cut; 0 where there is none.
    """

    num_rows: int = 0
    refused: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    shortest: int = 0

    def add(self, other: Account) -> None:
        """Take in the account of further rows.

        >>> account = Account(num_rows=2, refused=["a.jsonl:1: no"])
        >>> account.add(Account(num_rows=3, ignored=Counter(id=3)))
        >>> account.num_rows, account.refused, account.ignored
        (5, ['a.jsonl:1: no'], Counter({'id': 3}))
        """
        self.num_rows += other.num_rows
        self.refused += other.refused
        self.too_long += other.too_long
        self.cut += other.cut
        self.ignored += other.ignored
        self.shortest = min(filter(None, (self.shortest, other.shortest)), default=0)

    def remarks(self) -> list[str]:
        """What is not trained on, in words; empty where every row is used whole."""
        said = []
        if self.refused:
            said.append(f"{len(self.refused)} of {self.num_rows} rows cannot be used:\n{some(self.refused)}")
        if self.too_long:
            left_out = f"{len(self.too_long)} sequences are longer than data.max_length and left out"
            said.append(f"{left_out}:\n{some(self.too_long)}")
        if self.cut:
            said.append(f"{len(self.cut)} sequences are longer than data.max_length and cut:\n{some(self.cut)}")
        if self.ignored:
            keys = ", ".join(f"{key!r} ({count} rows)" for key, count in self.ignored.most_common())
            said.append(f"keys without a meaning in their format are ignored: {keys}")
        return said

    def as_json(self) -> dict[str, Any]:
        """The account as plain values."""
        return asdict(self)

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Account:
        """An account from what :meth:`as_json` gave."""
        return cls(**{**values, "ignored": Counter(values["ignored"])})


def some(reasons: list[str]) -> str:
    """The first of many reasons, a line each, and how many more there are."""
    more = [f"  ... and {len(reasons) - _LISTED} more"] if len(reasons) > _LISTED else []
    return "\n".join([f"  {reason}" for reason in reasons[:_LISTED]] + more)
