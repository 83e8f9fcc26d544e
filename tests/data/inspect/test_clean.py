"""A clean file gives the sequences that the data gave."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_sft.data.inspect.clean import left_out, write_clean
from lightning_sft.data.rows.messages import Reading
from lightning_sft.data.rows.mixture import Mixture, Part
from lightning_sft.data.tokens.dataset import Split, load_split
from lightning_sft.data.tokens.encode_rows import EncodingConfig
from lightning_sft.data.tokens.examples import Examples, to_record_batch
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.types import Example

USER, ANSWER = {"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Yo"}
BAD = {"prompt": 3, "completion": "x"}
ROWS: dict[str, list[Any]] = {
    "chat": [
        {"messages": [USER, ANSWER, USER, {**ANSWER, "weight": 0.5}], "weight": 2, "id": 1},
        {"messages": [USER, {**ANSWER, "loss": False, "timestamp": 1}, USER, ANSWER], "system": "Be kind."},
        {"messages": [USER]},
    ],
    "prompts": [{"prompt": [USER, ANSWER, USER], "completion": "Yo"}, BAD, {"prompt": "Hi", "completion": "Yo"}],
    "texts": [{"text": "Once"}, {"text": "upon", "weight": 0.5}, {"text": ""}],
    "tokens": [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [5, 6, 7], "loss_mask": [0, 0.5, 1]},
        {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]},
    ],
}


def load(source: Any, reading: Reading) -> Split:
    return load_split("train", source, EncodingConfig(tiny_tokenizer(), reading), invalid_rows="skip")


def sequences(split: Split) -> list[tuple[list[int], list[float]]]:
    def lists(example: Example) -> tuple[list[int], list[float]]:
        return [int(i) for i in example.input_ids], [float(w) for w in example.target_weights]

    return [lists(example) for example in split.examples]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("settings", [{}, {"train_on": "last", "system": "Be brief."}, {"train_on": "prompts"}])
def test_a_clean_file_gives_the_same_sequences(
    name: str, settings: dict[str, Any], jsonl: Callable[..., str], tmp_path: Path
) -> None:
    reading = Reading(**settings)
    split = load(jsonl(ROWS[name]), reading)
    out = tmp_path / "out.jsonl"
    assert write_clean(out, [split], reading) == {out: len({e.provenance for e in split.examples})}
    again = load(str(out), reading)
    assert sequences(again) == sequences(split)
    assert (again.account.refused, again.account.ignored) == ([], {})


def test_broken_lines_are_left_out_and_each_part_has_a_file(jsonl: Callable[..., str], tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS["prompts"])
    a, b = jsonl(f'{{"prompt": \n{lines}', "a.jsonl"), jsonl(ROWS["prompts"][2:], "b.jsonl")
    split = load(Mixture({"maths": a, "x/y": Part(b, system="Be kind.")}), Reading())
    out = tmp_path / "out.jsonl"
    files = write_clean(out, [split], Reading())
    assert files == {tmp_path / "out.maths.jsonl": 2, tmp_path / "out.x_y.jsonl": 1}
    assert "Be kind." in (tmp_path / "out.x_y.jsonl").read_text(encoding="utf-8")


def test_parts_whose_names_differ_in_unsafe_characters_alone_have_files_of_their_own(
    jsonl: Callable[..., str], tmp_path: Path
) -> None:
    rows = ROWS["prompts"][2:]
    split = load(Mixture({"x/y": jsonl(rows, "a.jsonl"), "x y": jsonl(rows * 2, "b.jsonl")}), Reading())
    assert list(write_clean(tmp_path / "out.jsonl", [split], Reading()).values()) == [1, 2]


def test_variables_of_the_row_are_kept_and_those_of_the_run_are_not(jsonl: Callable[..., str], tmp_path: Path) -> None:
    row = {"prompt": "Hi", "completion": "Yo", "chat_template_kwargs": {"mood": "x"}}
    reading = Reading(chat_template_kwargs={"pace": "slow"})
    out = tmp_path / "out.jsonl"
    write_clean(out, [load(jsonl([row]), reading)], reading)
    assert '"chat_template_kwargs": {"mood": "x"}' in out.read_text(encoding="utf-8")


def test_rows_that_are_held_out_are_in_the_clean_file_too(jsonl: Callable[..., str], tmp_path: Path) -> None:
    path = jsonl([{"prompt": f"{i}", "completion": "x"} for i in range(4)])
    whole = load(path, Reading())
    train, val = (
        replace(whole, examples=Examples([to_record_batch(whole.examples[part])]), part_sizes=[2])
        for part in (slice(0, 2), slice(2, 4))
    )
    out = tmp_path / "out.jsonl"
    assert write_clean(out, [train], Reading()) == {out: 2}
    assert write_clean(out, [train, val], Reading()) == {out: 4}


def test_rows_that_a_format_and_columns_were_needed_for_need_none_in_the_clean_file(
    jsonl: Callable[..., str], tmp_path: Path
) -> None:
    reading = Reading(format="prompt-completion", columns={"prompt": "q", "completion": "a"})
    split = load(jsonl([{"q": "Hi", "a": "Yo"}]), reading)
    write_clean(tmp_path / "out.jsonl", [split], reading)
    assert sequences(load(str(tmp_path / "out.jsonl"), Reading())) == sequences(split)


def test_each_row_that_is_left_out_is_counted_once(jsonl: Callable[..., str]) -> None:
    long = {"messages": [USER, ANSWER, {**USER, "content": "x" * 99}, ANSWER]}
    path = jsonl([{"messages": [USER, {**ANSWER, "content": "x" * 99}]}, long, {"messages": 3}, [USER, ANSWER]])
    config = EncodingConfig(tiny_tokenizer(), max_length=80)
    split = load_split("train", path, config, invalid_rows="skip")
    assert left_out([split]) == left_out([split, split]) == (1, 2)
