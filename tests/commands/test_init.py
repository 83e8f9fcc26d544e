"""What ``init`` writes runs, and it says what it saw."""

from __future__ import annotations

import builtins
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_sft.commands.init import init
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.main import main
from lightning_sft.types import InputError

QUICK = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def gsm(jsonl: Any) -> str:
    name = jsonl([{"question": f"What is {i}?", "answer": f"{i} it is", "id": i} for i in range(12)], "maths.jsonl")
    return str(name)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_it_writes_runs_as_it_is(pretrained: str, gsm: str, method: str) -> None:
    flags = ["--model", pretrained, "--data", gsm, "--val", gsm, "--method", method, "--devices", "1"]
    assert main(["init", *flags]) == Path("config.yaml")
    cli = main(["fit", "--config", "config.yaml", *QUICK])
    assert cli.trainer.global_step == 1
    assert "val/loss" in cli.trainer.callback_metrics
    assert (cli.model.tuning.lora is not None) is (method == "lora")
    assert main(["show", "--config", "config.yaml"]).result == []


def test_every_option_has_a_comment_and_the_file_is_strict_yaml(pretrained: str, gsm: str) -> None:
    text = init(pretrained, gsm, method="lora", devices=2, out="new/a.yaml").read_text()
    config = yaml.safe_load(text)
    assert config["data"]["columns"] == {"prompt": "question", "completion": "answer"}
    assert config["trainer"]["strategy"] == "ddp"
    for line in text.splitlines():
        is_section = re.fullmatch(r"\s*\w+:", line) is not None
        assert line.startswith("#") or is_section or re.search(r" # \w.{3}|^  # ", line), line


def test_a_file_that_is_there_is_not_written_over(pretrained: str, gsm: str) -> None:
    Path("config.yaml").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        init(pretrained, gsm)
    assert Path("config.yaml").read_text() == "mine"
    assert "trainer:" in init(pretrained, gsm, overwrite=True).read_text()


def test_on_a_terminal_it_asks_for_what_is_missing(
    pretrained: str, jsonl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = jsonl([{"said": "Hi", "replied": "Hello"}] * 3)
    answers = iter([pretrained, data, "said", "replied", "", "lora"])
    asked: list[str] = []

    def reply(prompt: object = "") -> str:
        asked.append(str(prompt))
        return next(answers)

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", reply)
    config = yaml.safe_load(init().read_text())
    assert len(asked) == 6
    assert config["data"]["columns"] == {"prompt": "said", "completion": "replied"}
    assert (config["data"]["train"], "val" in config["data"], config["model"]["lora"]["r"]) == (data, False, 16)


def test_elsewhere_it_says_which_flag_is_missing(pretrained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(InputError, match="init needs --model"):
        init()
    with pytest.raises(InputError, match="init needs --data"):
        init(pretrained)


def test_data_that_cannot_be_used_are_refused_with_the_reason(pretrained: str, jsonl: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="said"):
        init(pretrained, jsonl([{"said": "Hi", "replied": "Hello"}]))
    with pytest.raises(InputError, match=r"No row can be trained on.*the row has no answer|the row has no answer"):
        init(pretrained, jsonl([{"messages": [{"role": "user", "content": "Hi"}]}]))
    with pytest.raises(InputError, match="no data file"):
        init(pretrained, "nowhere.jsonl")
    tiny_tokenizer(None).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="has no chat template"):
        init(str(tmp_path / "bare"), jsonl([{"prompt": "Hi", "completion": "Yo"}]))
    assert not Path("config.yaml").exists()


def test_a_broken_line_is_said_and_the_others_are_looked_at(
    pretrained: str, jsonl: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    init(pretrained, jsonl('{"prompt": "a", "completion": "b"}\n{"prompt": \n{"prompt": "a", "completion": "c"}\n'))
    assert "fit will stop at rows that cannot be used, such as this: " in capsys.readouterr().err


def test_rows_at_which_fit_would_stop_are_said(pretrained: str, jsonl: Any, capsys: pytest.CaptureFixture[str]) -> None:
    init(pretrained, jsonl([{"prompt": "Hi", "completion": "Yo"}, {"prompt": "Hi", "completion": 7}]))
    assert "train.jsonl:2" in capsys.readouterr().err.replace("\n", "")
