"""``lightning-sft verify`` as the shell calls it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_sft.commands.verify.command import CHECKS, verify
from lightning_sft.commands.verify.verdict import Case, Outcome
from lightning_sft.data.rows.mixture import Mixture, Part
from lightning_sft.data.tokens.answer_shape import Answer
from lightning_sft.data.tokens.rendering import Rendering
from lightning_sft.main import main
from lightning_sft.types import InputError
from tests.helpers.verifying import settings


@pytest.fixture
def arguments(pretrained: str, jsonl: Any, rows: list[Any], tmp_path: Path) -> list[str]:
    flags = {"model.pretrained": pretrained, "data.train": jsonl(rows), "trainer.accelerator": "cpu"}
    flags |= {"trainer.default_root_dir": str(tmp_path / "run"), "out": str(tmp_path / "verdict.json")}
    return ["verify", *(text for key, value in flags.items() for text in (f"--{key}", value))]


def test_all_checks_pass_on_a_tiny_model_and_the_verdict_says_on_what(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--trainer.devices", "2", "--tokens", "80", "--samples", "3"]
    assert main([*arguments, *more]).result.passed
    found = json.loads((tmp_path / "verdict.json").read_text())
    assert found["passed"]
    assert len(found["checks"]) == len(CHECKS) == 5
    assert "2 sequences of" in found["about"]["samples"]
    assert "train.jsonl:" in found["about"]["samples"]
    assert "trainer.devices=2" in found["remarks"][0]
    assert "All checks pass." in capsys.readouterr().out


def test_a_failure_is_exit_code_1_and_names_the_row(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is trained is encoded without the stop token, which the template of inference has."""
    answer = Rendering.answer

    def without_stop(self: Any, turn: int) -> Answer:
        found = answer(self, turn)
        return replace(found, end=found.end - len("<|im_end|>"))

    monkeypatch.setattr(Rendering, "answer", without_stop)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--checks", "[contexts]", "--data.cache", "null"])
    assert stop.value.code == 1
    assert "no stop token" in capsys.readouterr().out
    [check] = json.loads((tmp_path / "verdict.json").read_text())["checks"]
    assert len(check["cases"][0]["failures"]) == 12
    assert "train.jsonl:1: turn 2" in check["cases"][0]["failures"][0]


def test_a_mixture_of_two_parts_is_verified(pretrained: str, jsonl: Any, rows: list[Any], tmp_path: Path) -> None:
    parts = {name: Part(jsonl(rows[:count], f"{name}.jsonl")) for name, count in (("a", 8), ("b", 4))}
    from lightning_sft import SFTDataModule, SFTModule

    module, data = SFTModule(pretrained), SFTDataModule(train=Mixture(parts), cache=None)
    assert verify(data, module, settings(tmp_path), tokens=80, samples=3, checks=["resume", "export"]).passed


def test_a_checkpoint_is_said_to_have_no_effect(arguments: list[str]) -> None:
    with pytest.warns(UserWarning, match="ckpt_path has no effect in verify"):
        assert main([*arguments, "--checks", "[contexts]", "--ckpt_path", "a.ckpt"]).result.passed


def test_a_check_that_cannot_be_run_has_failed_and_the_others_go_on(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(subject: Any) -> Outcome:
        raise InputError("no room on the disk")

    monkeypatch.setitem(CHECKS, "resume", no_room)
    monkeypatch.setitem(CHECKS, "export", lambda subject: Outcome("export", "", "", [Case("weights", 0.0, 0.0)]))
    with pytest.raises(SystemExit):
        main([*arguments, "--checks", "[resume, export]"])
    printed = capsys.readouterr().out
    assert "no room on the disk" in printed
    assert "passes" in printed


def test_classes_that_are_not_ours_and_figures_that_make_no_sense_are_refused(tmp_path: Path, pretrained: str) -> None:
    from lightning_sft import SFTDataModule, SFTModule

    with pytest.raises(InputError, match="needs an SFTModule"):
        verify(None, None, settings(tmp_path))
    with pytest.raises(InputError, match=r"verify.samples is 0; expected an integer >= 1"):
        verify(SFTDataModule([]), SFTModule(pretrained), settings(tmp_path), samples=0)
