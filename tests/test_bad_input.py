"""What a user gets wrong ends in one clear error, before any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_sft.demos import tiny_model, tiny_pretrained, tiny_tokenizer
from lightning_sft.main import main
from lightning_sft.types import InputError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a logger, Lightning saves config.yaml in the working directory."""
    monkeypatch.chdir(tmp_path)


GOOD = '{"prompt": "Hi", "completion": "Yo"}\n'


def fit(pretrained: str, *flags: Any) -> Any:
    quiet = ["--trainer.logger", "false", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    quiet += ["--trainer.enable_checkpointing", "false"]
    return main(["fit", "--model.pretrained", pretrained, *quiet, *map(str, flags)])


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("", [], "train.jsonl: the file has no rows"),
        (GOOD + "{", [], r"train.jsonl:2: not valid JSON"),
        (
            GOOD + '{"promt": "Hi", "completion": "Yo"}\n',
            [],
            r"train.jsonl:2: the keys .*'promt'.* are of no known format",
        ),
        (GOOD + '{"prompt": "Hi", "completion": 7}\n', [], r"train.jsonl:2: 'completion' must be a string"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}\n', [], "train.jsonl:1: the row has no answer"),
        (GOOD, ["--data.max_length", 5], "data.max_length=5 is less than the"),
        (GOOD, ["--data.tokens_per_batch", 5], r"train.jsonl:1: the sequence has .* more than data.tokens_per_batch=5"),
    ],
)
def test_data_that_cannot_be_used(pretrained: str, jsonl: Any, content: str, flags: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit(pretrained, "--data.train", jsonl(content), *flags)


def test_a_missing_file(pretrained: str) -> None:
    with pytest.raises(InputError, match=r"There is no data file 'nowhere.jsonl'"):
        fit(pretrained, "--data.train", "nowhere.jsonl")


def test_no_data_at_all(pretrained: str) -> None:
    with pytest.raises(InputError, match=r"There is no training data: set data.train"):
        fit(pretrained)


@pytest.mark.parametrize(("verb", "key"), [("test", "data.test"), ("predict", "data.predict")])
def test_no_data_for_the_verb(pretrained: str, verb: str, key: str) -> None:
    with pytest.raises(InputError, match=rf"set {key}"):
        main([verb, "--model.pretrained", pretrained, "--trainer.logger", "false", "--trainer.accelerator", "cpu"])


def test_a_path_that_is_no_model(tmp_path: Path, jsonl: Any) -> None:
    with pytest.raises(InputError, match=r"can be loaded from"):
        fit(str(tmp_path), "--data.train", jsonl(GOOD))


def test_a_tokenizer_without_a_chat_template(tmp_path: Path, jsonl: Any) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer(None).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"has no chat template.*data\.chat_template"):
        fit(str(tmp_path / "model"), "--data.train", jsonl(GOOD))


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_tokenizer_of_another_model(pretrained: str, tmp_path: Path, jsonl: Any, streaming: str) -> None:
    small = tiny_pretrained(tmp_path / "small", vocab_size=100, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    flags = ["--data.tokenizer", pretrained, "--data.streaming", streaming, "--trainer.max_steps", "1"]
    with pytest.raises(InputError, match=r"data.train has the token id 25\d, but the model has embeddings for 100"):
        fit(small, "--data.train", jsonl(GOOD), *flags)


def test_rows_left_out_are_counted_and_listed(pretrained: str, jsonl: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl(
        GOOD * 2 + '{"prompt": "Hi", "completion": 7}\n' + json.dumps({"prompt": "x" * 300, "completion": "y"})
    )
    fit(pretrained, "--data.train", path, "--data.invalid_rows", "skip")
    text = capsys.readouterr().out
    assert "1 of 4 rows cannot be used" in text
    assert "train.jsonl:3: 'completion' must be a string" in text
    assert "1 sequence is longer than data.max_length" in text
    assert "train.jsonl:4" in text
