"""Results of the checks of ``verify``, as a table and as plain values."""

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
    """A measured case of a check.

    Args:
        name: Name of what was measured.
        measured: Measured deviation.
        tolerance: Maximum deviation that passes.
        failures: Rows (``file:line``) or tensors beyond the tolerance, each with its deviation.
    """

    name: str
    measured: float
    tolerance: float
    failures: Sequence[str] = ()

    @property
    def passed(self) -> bool:
        """Whether the deviation is within the tolerance; NaN is not."""
        return self.measured <= self.tolerance and not self.failures

    @classmethod
    def of(cls, name: str, errors: Mapping[str, float], tolerance: float) -> Case:
        """The case of the largest of several errors, with those beyond the tolerance as failures, worst first.

        >>> Case.of("rows", {"a.jsonl:1": 0.5, "a.jsonl:2": 0.01, "a.jsonl:3": 0.7}, 0.1).failures
        ['a.jsonl:3: 0.7', 'a.jsonl:1: 0.5']
        """
        bad = {thing: error for thing, error in errors.items() if not error <= tolerance}  # NaN too
        measured = float("nan") if any(error != error for error in bad.values()) else max(errors.values(), default=0.0)
        worst_first = sorted(bad, key=lambda thing: -bad[thing])
        return cls(name, measured, tolerance, [f"{thing}: {bad[thing]:.3g}" for thing in worst_first])


@dataclass
class Outcome:
    """Result of a check.

    Args:
        check: Name of the check.
        proves: Property that holds if the check passes.
        measure: Meaning of the measured values.
        cases: Measured cases.
        remarks: Remarks for the reader.
        error: Error that prevented the check from completing, or ``None``.
        seconds: Duration in seconds.
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
        """Whether the check completed with at least one case, and all cases passed."""
        return self.error is None and bool(self.cases) and all(case.passed for case in self.cases)

    def as_json(self) -> dict[str, Any]:
        """The result as plain values, for JSON."""
        cases = [{**asdict(case), "failures": list(case.failures), "passed": case.passed} for case in self.cases]
        return {**asdict(self), "cases": cases, "passed": self.passed}


@dataclass
class Verdict:
    """Results of all checks.

    Args:
        about: Description of the subject: model, data, samples, device, precision, versions.
        outcomes: Result of each check.
        remarks: Remarks on what the checks do not cover.
    """

    about: dict[str, Any]
    outcomes: list[Outcome] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there was at least one check, and all passed."""
        return bool(self.outcomes) and all(outcome.passed for outcome in self.outcomes)

    def write(self, path: str | Path) -> None:
        """Write the verdict as JSON, with null for non-finite values."""
        found = {"passed": self.passed, "about": self.about, "checks": [o.as_json() for o in self.outcomes]}
        plain = json.loads(json.dumps({**found, "remarks": self.remarks}), parse_constant=lambda constant: None)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def show(self, console: Console) -> None:
        """Print a table of all cases, and the failures below it."""
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
                table.add_row("  not completed", "", "", Text("FAILS", "bold red"))
        console.print(table)
        for outcome in self.outcomes:
            _explain(outcome, console)
        for remark in self.remarks:
            console.print(f"Note: {remark}", highlight=False)
        style = "bold green" if self.passed else "bold red"
        console.print("All checks pass." if self.passed else "Some checks fail.", style=style)


def _explain(outcome: Outcome, console: Console) -> None:
    """Print the measure of a check, and details of its failures."""
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
    """The value if it is a whole number, otherwise a value different from it."""
    return value if value == value and abs(value) < 1e9 and value == round(value) else -1.0
