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
from lightning_sft.commands.init_size import Schedule, Size
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
    assert cli.trainer.global_step >= 10  # of 12 rows
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


@pytest.mark.parametrize("num_rows", [60, 250])
def test_few_rows_are_trained_in_tens_of_steps_as_it_says(pretrained: str, jsonl: Any, num_rows: int) -> None:
    data = jsonl([{"prompt": f"What is {i}?", "completion": f"It is {i}. " * (1 + i % 9)} for i in range(num_rows)])
    text = init(pretrained, data, method="full", devices=1, overwrite=True).read_text()
    said = int(re.search(rf"{num_rows:,} rows make about ([\d,]+) steps", text)[1].replace(",", ""))  # type: ignore[index]  # else the test fails
    assert yaml.safe_load(text)["trainer"]["max_epochs"] in (3, 5)
    steps = main(["fit", "--config", "config.yaml", *QUICK]).trainer.global_step
    assert steps >= 40
    assert said == pytest.approx(steps, rel=0.1)


def test_many_rows_have_the_defaults(pretrained: str) -> None:
    assert Schedule.of(Size(100_000, [300] * 9, [], 9), 1, False) == Schedule(None, 4, 1, 3663)
    assert Schedule.of(Size(100_000, [300] * 9, [], 9), 8, True).tokens_per_batch is None


def test_a_row_that_is_far_longer_than_others_is_named_with_its_remedy(
    pretrained: str, jsonl: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "a", "completion": "b" * (200 if i == 70 else 9)} for i in range(90)]
    init(pretrained, jsonl(rows))
    said = capsys.readouterr().err
    assert "1 of 90 sequences is far longer than the others" in said
    assert re.search(r"train.jsonl:71 has \d+\. .*data.max_length=\d\d leaves it out", said)


@pytest.mark.parametrize("val", [None, "20%"])
def test_rows_that_fit_leaves_out_are_said_and_do_not_count(
    pretrained: str, jsonl: Any, capsys: pytest.CaptureFixture[str], val: str | None
) -> None:
    rows = [{"prompt": f"Ask {i}", "completion": f"It is {i}. " * 3} for i in range(80)]
    rows += [{"prompt": "a", "completion": "b " * 3000}, {"prompt": "a", "completion": "c " * 4000}]
    data = jsonl(rows)
    text = init(pretrained, data, val=val, method="full", devices=1).read_text()
    said = capsys.readouterr().err
    assert "Of the first 82 rows, 2 sequences are longer than the model's context of 256 tokens and left out" in said
    assert re.search(r"train\.jsonl:81 \([\d,]+ tokens\)", said)
    assert "far longer" not in said
    assert "left out and counted (2 of the first 82 rows)" in text
    longest = int(re.search(r"of the first rows: (\d+)\)", text)[1])  # type: ignore[index]  # else the test fails
    told = int(re.search(r"82 rows make about (\d+) steps", text)[1])  # type: ignore[index]  # else the test fails
    cli = main(["fit", "--config", "config.yaml", *QUICK])
    lengths = [max(split.lengths) for split in cli.datamodule.splits.values()]
    assert (longest, len(cli.datamodule.splits["train"].account.too_long) > 0) == (max(lengths), True)
    assert told == pytest.approx(cli.trainer.global_step, rel=0.15)


def test_rows_that_are_all_too_long_are_refused(pretrained: str, jsonl: Any) -> None:
    with pytest.raises(InputError, match=r"every sequence of the first 3 rows is longer than .*256 tokens, such as"):
        init(pretrained, jsonl([{"prompt": "a", "completion": "b " * 3000}] * 3))


def test_a_row_that_the_template_refuses_is_said(
    pretrained: str, jsonl: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    unanswered = {"messages": [{"role": "user", "content": "Hi"}]}
    answered = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    init(pretrained, jsonl([*[answered] * 300, unanswered]))
    assert "train.jsonl:301: the row has no answer" in capsys.readouterr().err.replace("\n", "")


def test_a_share_of_the_data_may_be_the_validation(pretrained: str, gsm: str) -> None:
    assert yaml.safe_load(init(pretrained, gsm, val="5%").read_text())["data"]["val"] == "5%"


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
