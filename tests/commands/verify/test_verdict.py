"""A verdict passes only where everything was measured and is within its tolerance."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest

from lightning_sft.commands.verify.verdict import Case, Outcome, Verdict
from lightning_sft.machine.terminal import Console


def outcome(*cases: Case, error: str | None = None) -> Outcome:
    return Outcome("a check", "it holds", "a difference", list(cases), error=error)


@pytest.mark.parametrize(
    ("given", "passes"),
    [
        ([outcome(Case("x", 0.1, 0.1))], True),
        ([outcome(Case("x", 0.2, 0.1))], False),
        ([outcome(Case("x", math.nan, 0.1))], False),
        ([outcome(Case.of("x", {"a": math.nan, "b": 0.0}, 0.1))], False),
        ([outcome(Case("x", 0.0, 0.1, ["a.jsonl:1: no"]))], False),
        ([outcome(Case("x", 0.0, 0.1), error="out of memory")], False),
        ([outcome()], False),
        ([], False),
        ([outcome(Case("x", 0.0, 0.1)), outcome(Case("x", 1.0, 0.1))], False),
    ],
)
def test_nothing_but_measured_success_passes(given: list[Outcome], passes: bool) -> None:
    assert Verdict({}, given).passed is passes


def test_the_json_is_strict_and_has_every_failure(tmp_path: Path) -> None:
    errors = {f"a.jsonl:{i}": float(i) for i in range(1, 41)} | {"a.jsonl:41": math.nan}
    Verdict({"model": "m"}, [outcome(Case.of("rows", errors, 0.0))], ["a remark"]).write(tmp_path / "new" / "v.json")
    found = json.loads((tmp_path / "new" / "v.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    [case] = found["checks"][0]["cases"]
    assert (found["passed"], case["measured"], len(case["failures"])) == (False, None, 41)


def test_the_table_fits_80_columns_and_names_the_worst_failures() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    errors = {f"a.jsonl:{i}": float(i) for i in range(1, 41)}
    Verdict({"model": "[m]"}, [outcome(Case.of("rows", errors, 0.5))]).show(console)
    text = console.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "model: [m]" in text
    assert "rows: a.jsonl:40: 40" in text
    assert "30 more" in text
    assert "Some checks fail." in text
