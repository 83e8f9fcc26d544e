"""What the checks of ``verify`` found: each case with its measure and tolerance, as a table and as plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lightning_sft.machine.terminal import Console

_SHOWN = 10  # failures of a check on the terminal; the JSON has all


@dataclass(frozen=True)
class Case:
    """One thing that was measured.

    Args:
        name: What.
        measured: How far it is from what it must be.
        tolerance: Up to which it passes.
        failures: Each row (``file:line``) or tensor that is further off, and how far.
    """

    name: str
    measured: float
    tolerance: float
    failures: Sequence[str] = ()

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance; NaN is not."""
        return self.measured <= self.tolerance and not self.failures

    @classmethod
    def of(cls, name: str, errors: Mapping[str, float], tolerance: float) -> Case:
        """The largest error of named things, and each that is too large, the worst first.

        >>> Case.of("rows", {"a.jsonl:1": 0.5, "a.jsonl:2": 0.01, "a.jsonl:3": 0.7}, 0.1).failures
        ['a.jsonl:3: 0.7', 'a.jsonl:1: 0.5']
        """
        bad = {thing: error for thing, error in errors.items() if not error <= tolerance}  # NaN too
        measured = float("nan") if any(error != error for error in bad.values()) else max(errors.values(), default=0.0)
        worst_first = sorted(bad, key=lambda thing: -bad[thing])
        return cls(name, measured, tolerance, [f"{thing}: {bad[thing]:.3g}" for thing in worst_first])


@dataclass
class Outcome:
    """What one check found.

    Args:
        check: Its name.
        proves: What holds where it passes.
        measure: What the figures of its cases are.
        cases: What was measured.
        remarks: What a reader has to know besides.
        error: Why it could not be run to its end, where it could not.
        seconds: How long it took.
    """

    check: str
    proves: str
    measure: str
    cases: list[Case] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it ran, measured something, and all of it passed."""
        return self.error is None and bool(self.cases) and all(case.passed for case in self.cases)

    def as_json(self) -> dict[str, Any]:
        """The outcome as plain values."""
        cases = [{**asdict(case), "failures": list(case.failures), "passed": case.passed} for case in self.cases]
        return {**asdict(self), "cases": cases, "passed": self.passed}


@dataclass
class Verdict:
    """What all checks found.

    Args:
        about: On what they ran: model, data, rows, device, precision, versions.
        outcomes: Of each check.
        remarks: What they do not cover.
    """

    about: dict[str, Any]
    outcomes: list[Outcome] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there were checks, and all passed."""
        return bool(self.outcomes) and all(outcome.passed for outcome in self.outcomes)

    def write(self, path: str | Path) -> None:
        """Write it as JSON; a figure that is no number is null."""
        found = {"passed": self.passed, "about": self.about, "checks": [o.as_json() for o in self.outcomes]}
        plain = json.loads(json.dumps({**found, "remarks": self.remarks}), parse_constant=lambda constant: None)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def show(self, console: Console) -> None:
        """A table of all cases, and below it what failed."""
        for key, value in self.about.items():
            console.print(f"{key}: {value}", highlight=False)
        table = Table("check", "measured", "at most", "verdict", box=SIMPLE_HEAD)
        for column in table.columns[1:3]:
            column.justify = "right"
        for outcome in self.outcomes:
            table.add_row(Text(outcome.check, "bold"), "", "", Text(f"{outcome.seconds:.0f} s", "dim"))
            for case in outcome.cases:
                verdict = Text("passes", "green") if case.passed else Text("FAILS", "bold red")
                table.add_row(f"  {case.name}", _figure(case.measured), _figure(case.tolerance), verdict)
            if outcome.error is not None:
                table.add_row("  not run to its end", "", "", Text("FAILS", "bold red"))
        console.print(table)
        for outcome in self.outcomes:
            _explain(outcome, console)
        for remark in self.remarks:
            console.print(f"Note: {remark}", highlight=False)
        style = "bold green" if self.passed else "bold red"
        console.print("All checks pass." if self.passed else "It does not pass.", style=style)


def _explain(outcome: Outcome, console: Console) -> None:
    """What a check measured; and, where it failed, everything that is known of it."""
    console.print(f"{outcome.check}: {outcome.measure}.", style="dim", highlight=False)
    for remark in outcome.remarks:
        console.print(f"  {remark}", highlight=False)
    if outcome.error is not None:
        console.print(f"  {outcome.error}", style="red", highlight=False)
    for case in outcome.cases:
        for failure in case.failures[:_SHOWN]:
            console.print(f"  {case.name}: {failure}", style="red", highlight=False)
        if len(case.failures) > _SHOWN:
            console.print(f"  {case.name}: {len(case.failures) - _SHOWN:,} more", style="red")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value == int_of(value) else f"{value:.1e}"


def int_of(value: float) -> float:
    """The value where it is a whole number of rows or of nothing, else something that it is not equal to."""
    return value if value == value and abs(value) < 1e9 and value == round(value) else -1.0
