"""Random kills over 1, 2 and 4 ranks change nothing: a short version of docs/reference/kills.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.processes import fork
from tests.kills import FAMILIES, is_bad, table


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_forty_random_kills_of_all_layouts_change_nothing(tmp_path: Path) -> None:
    [ended] = fork("tests.kills", str(tmp_path), "0", "40", timeout=3500, without=["PL_GLOBAL_SEED"])
    found = json.loads(ended.printed.splitlines()[-1])
    assert found["kills"] >= 40
    assert not found["bad"]


def test_what_a_killed_run_must_not_differ_in_is_named() -> None:
    same = {"seed": 0, "family": "ddp on 4", "kills": 3, "ranks": [4, 4], "samples differ": False, "bits": 0}
    near = {"seed": 8, "family": list(FAMILIES)[-1], "kills": 4, "ranks": [1, 4], "furthest": 1e-7}
    assert not is_bad(same)
    assert not is_bad(near)
    bad = [
        same | {"bits": 1},
        same | {"samples differ": True},
        same | {"error": "RuntimeError"},
        near | {"furthest": 1e-5},
    ]
    assert all(map(is_bad, bad))
    assert "In all 7 kills of 2 runs; 0 runs ended with an error." in table([same, near])
