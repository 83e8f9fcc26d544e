from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.data.rows.mixture import Mixture, Part
from lightning_sft.data.tokens import dataset, encode_rows
from lightning_sft.data.tokens.dataset import Split, load_split
from lightning_sft.data.tokens.encode_rows import EncodingConfig, in_chunks
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.types import InputError

GOOD = {"prompt": "Hi", "completion": "Yo"}


def load(source: Any, num_workers: int, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Split:
    monkeypatch.setattr(dataset, "_ROWS_AT_A_TIME", 3)
    return load_split(
        "train", source, EncodingConfig(tiny_tokenizer(), **settings), invalid_rows="skip", num_workers=num_workers
    )


def test_workers_change_neither_examples_nor_the_account(jsonl: Callable[..., str], monkeypatch: Any) -> None:
    """Also not which format a file is said to have: that of its first good row, whoever reads it."""
    rows = [{"x": 1}, *([GOOD] * 4), {"instruction": "a", "output": "b"}, {**GOOD, "completion": 7}] * 3
    path = jsonl([{**row, "id": i} for i, row in enumerate(rows)])
    alone = load([path], 0, monkeypatch)
    both = load([path], 2, monkeypatch)
    assert both.account == alone.account
    assert len(alone.account.refused) == 9
    assert [e.provenance for e in both.examples] == [e.provenance for e in alone.examples]
    assert [list(e.input_ids) for e in both.examples] == [list(e.input_ids) for e in alone.examples]


def test_rows_of_token_ids_are_trained_as_they_are(jsonl: Callable[..., str], monkeypatch: Any) -> None:
    [text] = load([GOOD], 0, monkeypatch).examples
    labels = [i if w else -100 for i, w in zip(text.input_ids, text.target_weights, strict=True)]
    row = {"input_ids": [int(i) for i in text.input_ids], "labels": [int(label) for label in labels]}
    refused = {**row, "labels": [-100] * len(labels)}
    path = jsonl([row, refused, {**row, "weight": 3}, {**row, "id": 1}])
    mixture = Mixture({"ids": Part(path, weight=0.5)})
    split = load(mixture, 0, monkeypatch, normalize="sequence", max_length=len(labels))
    own, heavy, _ = split.examples
    assert list(own.input_ids) == row["input_ids"]
    assert sum(own.target_weights) == pytest.approx(0.5)
    assert [bool(w) for w in own.target_weights] == [label != -100 for label in labels]
    assert sum(heavy.target_weights) == pytest.approx(1.5)
    assert (len(split.account.refused), split.account.ignored) == (1, {"id": 1})
    assert len(load([path], 0, monkeypatch, max_length=len(labels) - 1, overflow="truncate").account.cut) == 3


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 6), st.integers(1, 120))
def test_chunks_have_at_most_so_many_rows_and_end_at_so_much_text(lengths: list[int], size: int, most: int) -> None:
    rows = [({"messages": [{"role": "user", "content": "x" * length}]}, f"row {i}") for i, length in enumerate(lengths)]
    chunks = list(in_chunks([lambda: iter(rows)], size, characters=most))
    assert [row for chunk in chunks for row in chunk] == rows
    for chunk in chunks[:-1]:
        texts = [len(row["messages"][0]["content"]) + len("user") for row, _ in chunk]
        assert len(chunk) == size or sum(texts) >= most
        assert sum(texts[:-1]) < most


def test_a_file_of_long_rows_is_encoded_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "a.jsonl", list[int]()
    path.write_text("".join(json.dumps({"prompt": "a", "completion": "b " * 300_000}) + "\n" for _ in range(9)))
    encode = encode_rows.encode_all
    monkeypatch.setattr(encode_rows, "encode_all", lambda rows, *args: seen.append(len(rows)) or encode(rows, *args))
    assert len(load_split("train", path, EncodingConfig(tiny_tokenizer()), num_workers=0).examples) == 9
    assert max(seen) == 4  # of 600 kB each


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_a_worker_is_the_users_message_and_no_traceback(
    jsonl: Callable[..., str], num_workers: int, monkeypatch: Any
) -> None:
    long = {**GOOD, "completion": "x" * 99}
    path = jsonl("".join(json.dumps(row) + "\n" for row in [*[GOOD] * 8, long]))
    with pytest.raises(InputError, match=r"^.*train.jsonl:9: the sequence has \d+ tokens") as error:
        load(path, num_workers, monkeypatch, max_length=90, overflow="error")
    assert "Traceback" not in str(error.value)


def test_forked_tokenizers_say_nothing_and_the_environment_stays(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    load([GOOD] * 50, 0, monkeypatch)
    load([GOOD] * 50, 2, monkeypatch)
    assert "forked" not in "".join(capfd.readouterr())
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_only_the_first_rows_are_read_where_no_more_are_asked_for(jsonl: Callable[..., str], tmp_path: Path) -> None:
    path = jsonl("".join(json.dumps(GOOD) + "\n" for _ in range(5)) + "{\n")
    assert len(load_split("train", path, EncodingConfig(tiny_tokenizer()), first=5).examples) == 5


def test_large_files_are_encoded_by_all_cores_and_others_by_none(
    jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    run = dataset.Chunks.run
    monkeypatch.setattr(dataset.Chunks, "run", lambda self, workers: (used.append(workers), run(self, 0))[1])
    monkeypatch.setattr(dataset, "num_cores", lambda: 7)
    path = jsonl([GOOD] * 9)
    load_split("train", path, EncodingConfig(tiny_tokenizer()))
    monkeypatch.setattr(dataset, "_LARGE", Path(path).stat().st_size)
    for source in (path, [path], [GOOD]):
        load_split("train", source, EncodingConfig(tiny_tokenizer()))
    assert used == [0, 7, 7, 0]


@pytest.mark.parametrize(("name", "value"), [("normalize", "tokens"), ("overflow", "cut"), ("max_length", 0.5)])
def test_settings_of_the_encoding_are_checked(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^(data|model)\.{name} is .*; expected "):
        EncodingConfig(tiny_tokenizer(), **{name: value})
