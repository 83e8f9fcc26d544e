from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_sft.data.sources import read
from lightning_sft.types import InputError


def test_each_line_of_jsonl_is_a_row_with_its_line_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": "é"}\n', encoding="utf-8")
    assert list(read(str(path))) == [({"a": 1}, f"{path}:1"), ({"a": "é"}, f"{path}:4")]


@pytest.mark.parametrize("indent", [None, 1])
def test_each_element_of_a_json_list_is_a_row_with_the_line_it_begins_on(tmp_path: Path, indent: int | None) -> None:
    rows = [{"a": [1, {"b": "]"}]}, {"a": 2}, {"a": 3}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
    got = list(read(path))
    assert [row for row, _ in got] == rows
    lines = [2, 10, 13] if indent else [1, 1, 1]
    assert [where for _, where in got] == [f"{path}:{line}" for line in lines]


def test_a_lone_json_object_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n{"a": 1}\n')
    assert list(read(path)) == [({"a": 1}, f"{path}:2")]


def test_several_files_follow_each_other(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for number, path in enumerate(paths):
        path.write_text(json.dumps({"a": number}))
    assert [row["a"] for row, _ in read([str(path) for path in paths])] == [0, 1]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}', encoding="utf-8-sig")
    assert [row for row, _ in read(path)] == [{"a": 1}]


BAD: list[tuple[str, Any, str]] = [
    ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl:2: not valid JSON"),
    ("a.json", '[{"a": 1},\n {"a" 2}]', r"a\.json:2: not valid JSON"),
    ("a.json", '[{"a": 1},\n {"a": 2', r"a\.json:2: not valid JSON"),
    ("a.jsonl", "", "has no rows"),
    ("a.json", "[]", "has no rows"),
    ("a.json", "", "has no rows"),
    ("a.jsonl", "[1]\n", r"a\.jsonl:1: a row must be a JSON object, got list"),
    ("a.json", "[1]", r"a\.json:1: a row must be a JSON object, got int"),
    ("a.txt", "hello", r"must end in \.jsonl or \.json"),
    ("a.jsonl", b"\xff\xfe", "not UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_what_cannot_be_read_is_one_error_that_names_the_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        list(read(path))


def test_a_missing_file_is_named_with_where_it_was_looked_for() -> None:
    with pytest.raises(InputError, match=r"no data file 'nowhere\.jsonl' \(looked in /"):
        list(read("nowhere.jsonl"))
