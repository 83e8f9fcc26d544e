"""Account of the rows that are skipped, truncated or split: counts and locations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_sft.io.words import counted
from lightning_sft.types import InputError

_LISTED = 5  # rows named in a message
_NOTED = 200  # rows remembered for each note


@dataclass
class RowReport:
    """An account of the rows of a source.

    Args:
        num_rows: Rows read.
        refused: One reason a row that cannot be used, with ``file:line``.
        too_long: ``file:line`` and length of each sequence left out because it is longer than ``max_length``.
        cut: ``file:line`` and length of each sequence that was truncated or split.
        ignored: Number of rows with each unused key.
        notes: Number of rows of which something has to be said though they are used, for each such thing.
        noted: ``file:line`` of the first 200 of them.
        unlisted: Number of rows beyond those listed in ``refused``, ``too_long`` and ``cut``, see :meth:`trim`.
        shortest: Tokens of the shortest sequence, before any was cut; 0 where there is none.
    """

    num_rows: int = 0
    refused: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    noted: dict[str, list[str]] = field(default_factory=dict)
    unlisted: Counter[str] = field(default_factory=Counter)
    shortest: int = 0

    def add(self, other: RowReport) -> None:
        """Take in the account of further rows.

        >>> account = RowReport(num_rows=2, refused=["a.jsonl:1: no"])
        >>> account.add(RowReport(num_rows=3, ignored=Counter(id=3)))
        >>> account.num_rows, account.refused, account.ignored
        (5, ['a.jsonl:1: no'], Counter({'id': 3}))
        """
        self.num_rows += other.num_rows
        self.refused += other.refused
        self.too_long += other.too_long
        self.cut += other.cut
        self.ignored += other.ignored
        self.notes += other.notes
        for what, places in other.noted.items():
            own = self.noted.setdefault(what, [])
            own += places[: max(0, _NOTED - len(own))]
        self.unlisted += other.unlisted
        self.shortest = min(filter(None, (self.shortest, other.shortest)), default=0)

    def note(self, what: str, place: str) -> None:
        """Count a row that is used, and of which this has to be said.

        >>> account = RowReport()
        >>> account.note("the template does not show the tools", "a.jsonl:1")
        >>> account.notes, account.noted
        (Counter({'the template does not show the tools': 1}), {'the template does not show the tools': ['a.jsonl:1']})
        """
        self.notes[what] += 1
        if len(own := self.noted.setdefault(what, [])) < _NOTED:
            own.append(place)

    def trim(self, most: int) -> None:
        """Forget the places of all but so many rows of a kind, and keep counting them: a stream may be endless.

        >>> account = RowReport(refused=["a.jsonl:1: no", "a.jsonl:2: no"])
        >>> account.trim(1)
        >>> account.refused, account.unlisted["refused"]
        (['a.jsonl:1: no'], 1)
        """
        for name in ("refused", "too_long", "cut"):
            places = getattr(self, name)
            self.unlisted[name] += max(0, len(places) - most)
            del places[most:]

    def remarks(self, name: str) -> list[str]:
        """What of a split is not trained on, in words; empty where every row is used whole."""
        said = []
        for kind, ends in {"refused": "", "too_long": "left out", "cut": "cut"}.items():
            if places := getattr(self, kind):
                count = len(places) + self.unlisted[kind]
                too_long = f"{counted(count, 'sequence', 'are')} longer than data.max_length and {ends}"
                what = too_long if ends else f"{count} of {counted(self.num_rows, 'row')} cannot be used"
                said.append(f"{what}:\n{some(places, count)}")
        if self.ignored:
            keys = ", ".join(f"{key!r} ({counted(count, 'row')})" for key, count in self.ignored.most_common())
            said.append(f"keys without a meaning in their format are ignored: {keys}")
        for what, count in self.notes.most_common():
            said.append(f"{what}: {counted(count, 'row')}, the first is {self.noted[what][0]}")
        return [f"{name}: {remark}" for remark in said]

    def refusal(self, name: str) -> InputError:
        """The error that there are rows that cannot be used."""
        return InputError(f"{self.remarks(name)[0]}\nCorrect them, or leave them out with data.invalid_rows=skip.")

    def as_json(self) -> dict[str, Any]:
        """The account as plain values."""
        return dict(vars(self))

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> RowReport:
        """An account from what :meth:`as_json` gave."""
        return cls(**{**values, **{name: Counter(values[name]) for name in ("ignored", "notes", "unlisted")}})


def some(reasons: list[str], count: int) -> str:
    """The first of so many reasons, a line for each that differs, and how many more there are.

    >>> print(some(["a:1: no answer", "a:2: no answer", "a:3: empty"], 3))
      a:1: no answer (and 1 more row)
      a:3: empty
    """
    groups: dict[str, list[str]] = {}
    for reason in reasons:
        groups.setdefault(reason.partition(": ")[2] or reason, []).append(reason)
    shown = list(groups.values())[:_LISTED]
    lines = [f"  {own[0]}" + (f" (and {counted(len(own) - 1, 'more row')})" if own[1:] else "") for own in shown]
    left = count - sum(map(len, shown))
    return "\n".join(lines + ([f"  ... and {left} more"] if left > 0 else []))
