"""The help of a verb is made once, until something that it depends on has changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_sft.commands import kept_help
from tests.helpers.processes import ROOT


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    monkeypatch.setattr(kept_help, "FOLDER", str(tmp_path / "help"))
    made: list[int] = []

    def make(code: int = 0) -> None:
        made.append(code)
        print(f"usage: fit, made {len(made)} times")
        sys.exit(code)

    def show(code: int = 0) -> tuple[str, object]:
        with pytest.raises(SystemExit) as end:
            kept_help.print_help("fit", lambda: make(code))
        return capsys.readouterr().out, end.value.code

    return show


def test_a_help_is_made_once_and_again_when_what_it_depends_on_has_changed(
    shown: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(shown)
    assert [shown(), shown()] == [("usage: fit, made 1 times\n", 0)] * 2
    monkeypatch.setenv("COLUMNS", "61")
    assert [shown(), shown()] == [("usage: fit, made 2 times\n", 0)] * 2
    monkeypatch.setattr(kept_help, "version", lambda name: "other")
    assert [shown(), shown()] == [("usage: fit, made 3 times\n", 0)] * 2
    assert len(list((tmp_path / "help").iterdir())) == 1


def test_a_help_that_fails_or_cannot_be_kept_is_made_each_time(
    shown: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(shown)
    assert [shown(2), shown(2)] == [("usage: fit, made 1 times\n", 2), ("usage: fit, made 2 times\n", 2)]
    (tmp_path / "file").touch()
    monkeypatch.setattr(kept_help, "FOLDER", str(tmp_path / "file" / "help"))
    assert [shown(), shown()] == [("usage: fit, made 3 times\n", 0), ("usage: fit, made 4 times\n", 0)]


def test_a_kept_help_is_shown_without_importing_what_made_it(tmp_path: Path) -> None:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('imported:', sorted({'torch', 'jsonargparse'} & set(sys.modules))))\n"
        "from lightning_sft.main import console\n"
        "console()"
    )
    command = [sys.executable, "-c", code, "completion", "--help"]
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout for _ in range(2)
    )
    assert first.startswith("usage: lightning-sft completion")
    assert first.endswith("imported: ['jsonargparse', 'torch']\n")
    assert second == first.replace("['jsonargparse', 'torch']", "[]")
