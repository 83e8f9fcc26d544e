from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_sft.data.rows.messages import Reading
from lightning_sft.data.rows.mixture import Mixture, Part
from lightning_sft.data.tokens import dataset
from lightning_sft.data.tokens.dataset import load_prompts, load_split
from lightning_sft.data.tokens.encode_rows import EncodingConfig
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.types import InputError

GOOD = {"prompt": "Hi", "completion": "Yo"}


def load(rows: list[dict[str, Any]], **settings: Any) -> Any:
    own = {name: settings.pop(name) for name in ("invalid_rows",) if name in settings}
    return load_split("train", rows, EncodingConfig(tiny_tokenizer(), **settings), **own)


def test_refused_rows_stop_everything_and_are_listed() -> None:
    rows = [GOOD, {**GOOD, "completion": 7}, {"messages": [{"role": "user", "content": "x"}]}]
    with pytest.raises(InputError) as error:
        load(rows)
    text = str(error.value)
    assert "2 of 3 rows cannot be used" in text
    assert "row 2: 'completion' must be a string" in text
    assert "row 3: the row has no answer" in text
    assert "data.invalid_rows=skip" in text


def test_skipped_rows_are_counted_and_said() -> None:
    split = load([GOOD, {**GOOD, "completion": 7}], invalid_rows="skip")
    assert (split.account.num_rows, len(split.examples), len(split.account.refused)) == (2, 1, 1)
    assert "1 of 2 rows cannot be used" in split.account.remarks("train")[0]


def test_a_broken_line_is_a_row_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{{broken\n{json.dumps(GOOD)}\n")
    recipe = EncodingConfig(tiny_tokenizer())
    split = load_split("train", path, recipe, invalid_rows="skip")
    assert (split.account.num_rows, len(split.examples)) == (3, 2)
    assert "a.jsonl:2: not valid JSON" in split.account.refused[0]
    with pytest.raises(InputError, match=r"1 of 3 rows cannot be used:\n .*a.jsonl:2: not valid JSON"):
        load_split("train", path, recipe)


def test_prompts_that_cannot_be_used_are_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{json.dumps(GOOD)}\n{{broken\n{{"x": 1}}\n{json.dumps(GOOD)}\n')
    with pytest.warns(UserWarning, match=r"predict: 2 of 4 rows cannot be used:\n .*a.jsonl:2: not valid JSON"):
        prompts = load_prompts(path, tiny_tokenizer(), invalid_rows="skip", title="predict")
    assert [prompt.provenance for prompt in prompts] == [f"{path}:1", f"{path}:4"]
    with pytest.raises(InputError, match=r"a.jsonl:2: not valid JSON"):
        load_prompts(path, tiny_tokenizer(), title="predict")
    with pytest.raises(InputError, match="predict: no row can be used"):
        load_prompts([{"x": 1}], tiny_tokenizer(), invalid_rows="skip", title="predict")


def test_what_is_read_of_a_folder_is_said_and_a_test_split_is_not_trained_on(tmp_path: Path) -> None:
    recipe = EncodingConfig(tiny_tokenizer())
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / "both").mkdir(exist_ok=True)
        (tmp_path / "both" / name).write_text(json.dumps({**GOOD, "completion": name}))
    with pytest.warns(UserWarning, match=r"train: of the folder '.*/both', read train.jsonl, left out test.jsonl"):
        split = load_split("train", tmp_path / "both", recipe)
    assert [example.provenance for example in split.examples] == [f"{tmp_path}/both/train.jsonl:1"]
    with pytest.raises(InputError, match=r"data.val: the folder .* has files for training and others \(test.jsonl\)"):
        load_split("val", tmp_path / "both", recipe)
    (tmp_path / "both" / "train.jsonl").unlink()
    assert len(load_split("test", tmp_path / "both", recipe).examples) == 1
    with pytest.raises(
        InputError, match=r"data.train: all data files .* are for validation or testing.*name the files"
    ):
        load_split("train", tmp_path / "both", recipe)
    assert len(load_split("train", tmp_path / "both" / "test.jsonl", recipe).examples) == 1


def test_a_glob_with_a_test_split_among_its_files_is_not_trained_on(tmp_path: Path) -> None:
    recipe, folder = EncodingConfig(tiny_tokenizer()), tmp_path / "test-bench" / "data"
    folder.mkdir(parents=True)
    for name in ("train-1.jsonl", "train-2.jsonl"):
        (folder / name).write_text(json.dumps({**GOOD, "completion": name}))
    assert len(load_split("train", f"{folder}/*.jsonl", recipe).examples) == 2  # however the folder is called
    for name in ("test.jsonl", "validation/part.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({**GOOD, "completion": name}))
        with pytest.raises(
            InputError, match=rf"for training and others, .*{name}\)\. Name the files, or give the folder"
        ):
            load_split("train", f"{folder}/**/*.jsonl", recipe)
        (folder / name).unlink()
    (folder / "test.jsonl").write_text(json.dumps(GOOD))
    assert len(load_split("test", f"{folder}/test*.jsonl", recipe).examples) == 1
    assert len(load_split("train", f"{folder}/train*.jsonl", recipe).examples) == 2


def test_long_sequences_are_left_out_counted_and_said() -> None:
    split = load([GOOD, {**GOOD, "completion": "x" * 500}], max_length=200)
    assert len(split.examples) == 1
    assert "1 sequence is longer than data.max_length" in split.account.remarks("train")[0]
    assert "row 2 (5" in split.account.remarks("train")[0]


def test_a_max_length_below_every_sequence_says_how_long_the_shortest_is() -> None:
    shortest = len(load([GOOD]).examples[0])
    with pytest.raises(InputError, match=f"data.max_length=16 is less than the {shortest} tokens"):
        load([GOOD], max_length=16)


def test_nothing_left_is_an_error_even_when_rows_may_be_skipped() -> None:
    with pytest.raises(InputError, match="no row can be used"):
        load([{**GOOD, "completion": 7}], invalid_rows="skip")


def test_ignored_keys_are_counted_and_said() -> None:
    split = load([{**GOOD, "id": 1}, {**GOOD, "id": 2, "wieght": 0.5}])
    assert split.account.remarks("train") == [
        "train: keys without a meaning in their format are ignored: 'id' (2 rows), 'wieght' (1 row)"
    ]


def test_rows_are_accounted_for_in_order_however_many_are_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**GOOD, "completion": 7 if i % 3 == 2 else f"Yo {i}"} if i % 3 else {"id": i} for i in range(7)]
    monkeypatch.setattr(dataset, "_ROWS_AT_A_TIME", 2)
    split = load(rows, invalid_rows="skip")
    assert split.account.num_rows == 7
    assert [example.provenance for example in split.examples] == ["row 2", "row 5"]
    refused = [reason.partition(":")[0] for reason in split.account.refused]
    assert refused == ["row 1", "row 3", "row 4", "row 6", "row 7"]


def test_columns_of_other_names_and_a_named_format() -> None:
    rows = [{"question": "Hi", "answer": "Yo", "text": "x"}]
    columns = {"prompt": "question", "completion": "answer"}
    mapped = load(rows, reading=Reading("prompt-completion", columns))
    assert list(mapped.examples[0].input_ids) == list(load([GOOD]).examples[0].input_ids)
    [prompt] = load_prompts(rows, tiny_tokenizer(), Reading("prompt-completion", columns))
    assert prompt.reference == "Yo"


def test_mixed_formats_of_a_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({"instruction": "Hi", "output": "Yo"}))
    with pytest.raises(InputError, match=r"a.jsonl:2: the row is of the format alpaca, but .*a.jsonl:1 is of prompt-"):
        load_split("train", path, EncodingConfig(tiny_tokenizer()))


def test_only_a_few_of_many_refused_rows_are_named() -> None:
    with pytest.raises(InputError, match=r"\.\.\. and 15 more"):
        load([{**GOOD, "completion": number} for number in range(20)])


def test_a_refusal_that_many_rows_share_is_said_once() -> None:
    part = Part([{"question": "Hi", "answer": "Yo"}] * 9, columns={"prompt": "question", "completion": "ansewr"})
    with pytest.raises(InputError) as refused:
        load_split("train", Mixture({"only": part}), EncodingConfig(tiny_tokenizer()))
    said = str(refused.value)
    assert said.count("which data.columns=") == 1
    assert "row 1: the row has no 'ansewr'" in said
    assert "Did you mean answer? (and 8 more rows)" in said


def test_what_is_too_long_is_cut_as_asked_counted_and_said() -> None:
    rows = [GOOD, {**GOOD, "completion": "x" * 500}]
    split = load(rows, max_length=200, overflow="truncate")
    assert [len(example) for example in split.examples][1:] == [200]
    assert "1 sequence is longer than data.max_length and cut" in split.account.remarks("train")[0]
    with pytest.raises(InputError, match=r"row 2: the sequence has .* more than data.max_length=200"):
        load(rows, max_length=200, overflow="error")
    split = load([{"text": "x" * 500}], max_length=200, overflow="split")
    assert split.num_targets == 500  # 500 letters and the end, less the first, which has no context
