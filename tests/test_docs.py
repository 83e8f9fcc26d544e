"""What the documents say is so: code blocks run, linked tests exist, commands and keys are real."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_sft.data.rows.messages import Converter
from lightning_sft.main import main
from lightning_sft.types import Conversation
from tests.helpers.pages import blocks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jsonl: Any, rows: list[dict[str, str]]) -> Path:
    monkeypatch.chdir(tmp_path)
    jsonl(rows)
    jsonl(rows, "val.jsonl")
    return tmp_path


def test_the_six_lines_of_python_run(user_folder: Path, pretrained: str, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = blocks(README, "python")
    assert len([line for line in code.splitlines() if line]) == 5  # and an empty line
    exec(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", pretrained), scope := {})
    assert scope["data"].trainer.global_step == 1


def test_the_three_lines_of_shell_run(user_folder: Path, pretrained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [line.split() for line in blocks(README, "bash")[1].splitlines()]
    assert [command[0] for command in commands] == ["lightning-sft"] * 3
    assert commands[0][1:] == ["fetch-demo-model", "--folder", "SmolLM2"]
    (user_folder / "SmolLM2").symlink_to(pretrained)
    assert main(commands[0][1:]) == Path("SmolLM2")  # skipped: it is there
    main(commands[1][1:])
    out = main(commands[2][1:])
    assert (out / "model.safetensors").is_file()


def test_every_linked_file_and_test_exists() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]:
        for name, target in re.findall(r"\[([^\]]+)\]\((?!https:)([^)#]+)\)", document.read_text(encoding="utf-8")):
            path = document.parent / target
            assert path.exists(), f"{document.name} links to {target}"
            if name.startswith("test_"):
                assert f"def {name}(" in path.read_text(encoding="utf-8"), name


def test_the_test_command_of_the_readme_is_what_ci_runs() -> None:
    assert blocks(README, "bash")[2].strip() == "make test"
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_tree_of_the_readme_is_the_tree() -> None:
    [tree] = blocks(README, "")[-1:]
    for name in re.findall(r"^  (\S+)", tree, re.MULTILINE):
        assert (ROOT / "lightning_sft" / name).exists(), name


def test_the_rows_of_the_data_page_are_rows() -> None:
    page = (ROOT / "docs" / "howto" / "data.md").read_text(encoding="utf-8")
    for line in blocks(page, "json")[0].splitlines():
        read = Converter().read(json.loads(line), "f:1")
        assert (read.weights if isinstance(read, Conversation) else read.target_weights)[-1] > 0


def test_the_commands_and_the_code_of_the_page_on_resuming_run(
    user_folder: Path, pretrained: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "howto" / "resume.md").read_text(encoding="utf-8")
    (user_folder / "SmolLM2").symlink_to(pretrained)
    first, replayed = (block.split()[1:] for block in blocks(page, "bash"))
    assert main(first).trainer.global_step == main(first).trainer.global_step == 1  # the second time, nothing is left
    assert {path.name for path in Path("runs/one").iterdir()} >= {"checkpoints", "samples.jsonl"}
    assert main(replayed).result.is_exact
    [code] = blocks(page, "python")
    exec(code, scope := {})
    assert scope["trainer"].global_step == 1
    callbacks = yaml.safe_load(blocks(page, "yaml")[0])["trainer"]["callbacks"]
    (user_folder / "own.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    data = ["--data.val", "val.jsonl", "--trainer.max_epochs", "2"]
    assert main([*first, *data, "--config", "own.yaml", "--trainer.default_root_dir", "own"]).trainer.global_step == 2
