"""No text of data, files or models reaches a terminal as anything but text."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.panel import Panel
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from lightning_sft.data.rows.mixture import Mixture, Part
from lightning_sft.machine.terminal import Console, printable
from lightning_sft.main import main
from lightning_sft.types import InputError

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\u202e"
SHOWN = "<U+001B>[2J<U+001B>]0;owned<U+0007><U+009B>31m<U+000D><U+202E>"


def has_control(text: str) -> bool:
    return printable(text) != text


def test_whatever_is_printed_on_a_console_is_text_alone() -> None:
    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL)
    for thing in (EVIL, Text(EVIL), Text.assemble("a", (EVIL, "bold")), table, Panel(EVIL, title=EVIL), [EVIL]):
        console = Console(file=io.StringIO(), width=400)
        console.print(thing)
        printed = console.file.getvalue()  # type: ignore[attr-defined] # it is the StringIO
        assert [line for line in printed.split("\n") if has_control(line)] == []
        assert "owned" in printed
    console = Console(file=io.StringIO(), force_terminal=True, width=400, highlight=False)
    console.print(EVIL, style="red")
    assert console.file.getvalue() == f"\x1b[31m{SHOWN}\x1b[0m\n"  # type: ignore[attr-defined]  # the same


def test_markup_in_data_is_text_too() -> None:
    console = Console(file=io.StringIO(), width=100)
    table = Table("name")
    table.add_row("[/x] [link=http://evil]a[/link]")
    console.print(table, "[/red].jsonl")
    assert "[/x] [link=http://evil]a[/link]" in console.file.getvalue()  # type: ignore[attr-defined]  # the same


def test_an_error_quotes_data_as_text_also_from_another_process() -> None:
    error = InputError(f"{EVIL}\n\tnext line")
    assert str(error) == f"{SHOWN}\n\tnext line"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_part_whose_name_cannot_be_printed_is_refused() -> None:
    with pytest.raises(InputError, match="characters that cannot be printed"):
        Mixture({f"math{EVIL}": Part("a.jsonl")})


def test_a_key_of_the_data_writes_no_setting_into_the_config_of_init(pretrained: str, tmp_path: Path) -> None:
    key = "x\ntrainer:\n  callbacks: evil.Callback\n#"
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b", key: "c"}))
    main(["init", "--model", pretrained, "--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "a.yaml")])
    config = yaml.safe_load((tmp_path / "a.yaml").read_text())
    assert "callbacks" not in config["trainer"]
    assert config["data"]["train"] == str(tmp_path / "a.jsonl")


@pytest.mark.parametrize("verb", ["init", "show", "show of refused rows", "fit"])
def test_keys_rows_and_names_of_files_reach_no_terminal(
    verb: str, pretrained: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows: list[Any] = [{"prompt": f"Say {i} {EVIL}", "completion": EVIL, f"key{EVIL}": "x"} for i in range(4)]
    file = tmp_path / f"a{EVIL}[red].jsonl"
    if verb == "show of refused rows":
        rows.append({"prompt": EVIL, "completion": ""})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if verb == "init":
        main(["init", "--model", pretrained, "--data", str(file), "--out", "a.yaml"])
        assert (tmp_path / "a.yaml").read_text().replace("\n", "").isprintable()
    else:
        settings = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.max_steps", "1"]
        settings += [
            "--model.pretrained",
            pretrained,
            "--data.train",
            str(file),
            "--trainer.enable_progress_bar",
            "false",
        ]
        given = [verb.partition(" ")[0], *settings]
        try:
            main(given)
        except InputError as error:
            print(error)
    printed = "".join(capfd.readouterr()).replace("\rLoading weights", "")  # a progress bar of transformers
    assert verb == "fit" or "<U+001B>" in printed
    assert [line for line in printed.split("\n") if has_control(line)] == []


def test_a_key_of_a_config_reaches_no_terminal(
    tmp_path: Path, pretrained: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"data": {EVIL: 1}}))
    with pytest.raises(SystemExit):
        main(["fit", "--model.pretrained", pretrained, "--config", str(tmp_path / "a.yaml")])
    assert SHOWN.partition("<U+000D>")[0] in (printed := capfd.readouterr().err)
    assert not has_control(printed.replace("\n", ""))


def test_where_colors_are_forced_into_a_pipe_no_cursor_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Jupyter forces them upon its shells."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-color")
    printed = io.StringIO()
    console = Console(file=printed)
    with Progress(console=console, transient=True) as progress:
        progress.advance(progress.add_task("Encoding", total=2))
    console.print("done", style="red")
    assert printed.getvalue() == "\n\x1b[31mdone\x1b[0m\n"
