from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from datasets import IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from pyarrow import feather, ipc, parquet

from lightning_sft.data.sources import Source, leaves, read
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
    ("a.jsonl", "1\n", r"a\.jsonl:1: a row must be an object with named keys, or a list of messages, got int"),
    ("a.json", "[1]", r"a\.json:1: a row must be an object with named keys, or a list of messages, got int"),
    ("a.txt", "hello", r"must end in \.jsonl, \.json, \.csv, \.parquet, \.arrow, \.ipc; .*\.gz or \.zst"),
    ("a.parquet.gz", "hello", r"must end in \.jsonl"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}', r"a\.jsonl:2: not UTF-8 text \(invalid start byte at byte 7 of the line\)"),
    ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', r"a\.json:2: not UTF-8"),
    ("a.csv", b"a\n\xff", r"a\.csv:2: not UTF-8"),
    ("a.json", '[{"a": 1} {"a": 2}]', r"a\.json:1: not valid JSON: expected a comma or the end of the list"),
    ("a.json", '[{"a": 1},]', r"a\.json:1: not valid JSON"),
    ("a.json", '[{"a": 1}]\n{"a": 2}', r"a\.json:1: not valid JSON: expected a comma or the end of the list"),
    ("a.json", '[{"a": 1},', r"a\.json:1: not valid JSON"),
    ("a.json", '{"a": 1},{"a": 2}', r"a\.json:1: not valid JSON"),
    ("a.jsonl", '{"a": 1}\n{"a": NaN}', r"a\.jsonl:2: not valid JSON: NaN is no JSON value"),
    ("a.json", '[{"a": 1},\n{"a": -Infinity}]', r"a\.json:2: not valid JSON: -Infinity is no JSON value"),
    ("a.jsonl", '{"a": 1e999}', r"a\.jsonl:1: not valid JSON: the number 1e999 is too large"),
    ("a.jsonl", '{"a": {"b": 1, "c": 2, "b": 1}}', r"a\.jsonl:1: not valid JSON: the key 'b' is there twice"),
    ("a.json", '[\n\n{"a": 1, "a": 2}]', r"a\.json:3: not valid JSON: the key 'a' is there twice"),
    ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: not valid JSON: it is nested too deeply"),
    ("a.jsonl", "9" * 5_000, r"a\.jsonl:1: not valid JSON: Exceeds the limit"),
    ("a.csv", "", "has no rows"),
    ("a.csv", "a,b\n", "has no rows"),
    ("a.csv", "a,b\n1,2\n3\n", r"a\.csv:3: the row has 1 cells, the header 2"),
    ("a.csv", "a,a\n1,2\n", r"a\.csv:1: two columns have the same name"),
    ("a.csv", 'a,b\n1,"2" 3\n', r"a\.csv:2: not valid CSV"),
    ("a.jsonl.gz", "hello", r"a\.jsonl\.gz: cannot be read: Not a gzipped file"),
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 9)[:-9], r"a\.jsonl\.gz: cannot be read: Compressed file ended"),
    ("a.jsonl.zst", "hello", r"a\.jsonl\.zst: cannot be read"),
    ("a.parquet", "hello", r"a\.parquet: cannot be read"),
    ("a.arrow", "hello", r"a\.arrow: cannot be read"),
    ("a.arrow", "ARROW1 hello", r"a\.arrow: cannot be read"),
    ("a.arrow", "", r"a\.arrow: cannot be read"),
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


ROWS = [{"a": "x", "b": "1"}, {"a": 'é "quoted"\n', "b": ""}]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("pack", ["", ".gz", ".zst"])
def test_text_may_be_packed(tmp_path: Path, name: str, pack: str) -> None:
    text = {
        "a.jsonl": jsonl(ROWS),
        "a.json": json.dumps(ROWS).encode(),
        "a.csv": 'a,b\nx,1\n"é ""quoted""\n",\n'.encode(),
    }[name]
    packs: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        ".gz": gzip.compress,
        ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
    }
    path = tmp_path / (name + pack)
    path.write_bytes(packs[pack](text))
    assert [row for row, _ in read(path)] == ROWS


def test_a_packed_file_may_be_of_several_parts(tmp_path: Path) -> None:
    for name, pack in {
        "a.jsonl.gz": gzip.compress,
        "a.jsonl.zst": lambda d: pyarrow.compress(d, "zstd", asbytes=True),
    }.items():
        (tmp_path / name).write_bytes(pack(jsonl([{"a": 1}])) + pack(jsonl([{"a": 2}])))
        assert list(read(tmp_path / name)) == [({"a": 1}, f"{tmp_path / name}:1"), ({"a": 2}, f"{tmp_path / name}:2")]


def test_without_zst_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    monkeypatch.setattr(pyarrow, "Codec", SimpleNamespace(is_available=lambda name: False))
    with pytest.raises(InputError, match="pip install -U pyarrow"):
        list(read(tmp_path / "a.jsonl.zst"))


def test_the_line_of_a_csv_row_is_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\r\n"1\r\n1",2\r\n\r\n3,4\r\n')
    assert list(read(path)) == [({"a": "1\r\n1", "b": "2"}, f"{path}:2"), ({"a": "3", "b": "4"}, f"{path}:5")]


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a\n" + "x" * 200_000)
    [(row, _)] = read(tmp_path / "a.csv")
    assert len(row["a"]) == 200_000


def write_stream(table: Any, path: Path) -> None:
    with ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


TABLES: dict[str, Callable[[Any, Path], Any]] = {
    "a.parquet": lambda table, path: parquet.write_table(table, path, row_group_size=2),
    "a.ipc": lambda table, path: feather.write_feather(table, str(path)),
    "a.arrow": write_stream,
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_give_rows_by_number_without_the_nulls_that_the_schema_adds(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = [{"calls": [{"args": {"city": "Rome"}}]}, {"calls": [{"args": {"day": 3}}, None]}, {"calls": []}]
    TABLES[name](pyarrow.Table.from_pylist(rows), path)
    assert list(read(path)) == [(row, f"{path}:row {number}") for number, row in enumerate(rows, 1)]


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_cannot_be_read_are_named(tmp_path: Path, name: str) -> None:
    TABLES[name](pyarrow.table({"a": pyarrow.array([], pyarrow.string())}), tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: the file has no rows"):
        list(read(tmp_path / name))
    TABLES[name](pyarrow.Table.from_arrays([[1], [2]], names=["a", "a"]), tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: two columns have the same name"):
        list(read(tmp_path / name))
    TABLES[name](pyarrow.table({"a": ["x" * 500] * 9}), tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{name}: cannot be read"):
        list(read(tmp_path / name))


def test_json_keeps_values_of_different_types_and_their_nulls(tmp_path: Path) -> None:
    rows = [{"a": {"x": 1, "y": None}}, {"a": {"x": "1"}}, {"a": {"x": [1.5, True]}}]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    assert [row for row, _ in read(tmp_path / "a.jsonl")] == rows


def test_folders_and_globs_are_read_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data = jsonl([{"name": name}])
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (tmp_path / "README.md").write_text("x")

    def names(source: Any) -> list[str]:
        return [row["name"] for row, _ in read(source)]

    assert names(tmp_path) == ["a.jsonl.gz", "b.jsonl", "sub/c.json"]
    assert names(f"{tmp_path}/*.json*") == ["a.jsonl.gz", "b.jsonl"]
    assert names(f"{tmp_path}/**/*.json") == ["sub/c.json"]
    assert names([f"{tmp_path}/s*", f"{tmp_path}/b.jsonl"]) == ["sub/c.json", "b.jsonl"]


def test_a_folder_or_glob_without_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(InputError, match=r"There is no data file in the folder '.*'"):
        list(read(tmp_path))
    with pytest.raises(InputError, match=r"There is no data file '.*\*\.jsonl'"):
        list(read(f"{tmp_path}/*.jsonl"))


@pytest.mark.parametrize("source", ["a.jsonl", ["a.jsonl"], ["a.jsonl", "b.jsonl"], [{"prompt": "Hi"}]])
def test_a_saved_config_names_the_source_that_was_given(source: Any) -> None:
    parser = ArgumentParser()
    parser.add_argument("--train", type=Source)
    saved = parser.dump(parser.parse_object({"train": source}))
    assert parser.parse_string(saved).train == source


def test_a_list_keeps_its_rows_as_they_are() -> None:
    rows: list[Any] = [{"a": None}, [{"role": "user", "content": "x"}]]
    assert [row for row, _ in read(rows)] == rows
    with pytest.raises(InputError, match="row 1: a row must be an object"):
        list(read([3]))


def test_data_sets_give_rows_without_the_nulls_that_the_schema_adds(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    rows = [{"args": {"city": "Rome"}}, {"args": {"day": 3}}]
    data = Dataset.from_list(rows)
    assert list(read(data)) == [(row, f"row {number}") for number, row in enumerate(rows, 1)]
    assert [row for row, _ in read(data.to_iterable_dataset())] == rows
    folder = tmp_path / "saved"
    data.save_to_disk(folder)
    assert list(read(folder)) == [(row, f"{folder}:row {number}") for number, row in enumerate(rows, 1)]
    several = DatasetDict({"train": data, "test": data})
    with pytest.raises(InputError, match=r"has the splits \['test', 'train'\]: give one of them"):
        list(read(several))
    several.save_to_disk(tmp_path / "several")
    with pytest.raises(InputError, match=r"several' has the splits \['test', 'train'\]: name one, .*several/train"):
        list(read(tmp_path / "several"))
    assert [row for row, _ in read(tmp_path / "several" / "test")] == rows
    (folder / "state.json").unlink()
    with pytest.raises(InputError, match="saved' cannot be loaded"):
        list(read(folder))


@pytest.mark.parametrize(
    ("name", "config", "split"),
    [
        ("hf:owner/name", None, None),
        ("hf:owner/name:train", None, "train"),
        ("hf:owner/name:train[:100]", None, "train[:100]"),
        ("hf:owner/name:main:train[10%:]", "main", "train[10%:]"),
    ],
)
def test_a_data_set_of_the_hub_is_loaded_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, config: str | None, split: str | None
) -> None:
    calls = []

    def load(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return [{"a": 1}] if split else {"train": [{"a": 1}]}

    monkeypatch.setattr("datasets.load_dataset", load)
    assert list(read(name)) == [({"a": 1}, f"{name}:row 1")]
    assert calls == [(("owner/name", config), {"split": split})]  # and no trust_remote_code


def test_a_data_set_of_the_hub_is_read_while_it_is_downloaded_for_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return IterableDataset.from_generator(lambda: iter([{"a": 1, "b": None}, {"a": 2, "b": 3}]))

    monkeypatch.setattr("datasets.load_dataset", load)
    [leaf] = leaves("hf:owner/name:train", streaming=True)
    assert list(leaf()) == [({"a": 1}, "hf:owner/name:train:row 1"), ({"a": 2, "b": 3}, "hf:owner/name:train:row 2")]
    assert calls == [{"split": "train", "streaming": True}]


def test_what_the_hub_cannot_give_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, *_: Any, **__: Any) -> Any:
        if name == "none":
            return []
        if name == "two":
            return {"train": [{"a": 1}], "test": [{"a": 1}]}
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(InputError, match="'hf:a/b' cannot be loaded: Couldn't reach it"):
        list(read("hf:a/b"))
    with pytest.raises(InputError, match=r"has the splits \['test', 'train'\]: name one, hf:two:train"):
        list(read("hf:two"))
    with pytest.raises(InputError, match="'hf:none' has no rows"):
        list(read("hf:none"))
    with pytest.raises(InputError, match="'hf:a:b:c:d' names no data set"):
        list(read("hf:a:b:c:d"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text(), JSON, max_size=3), min_size=1, max_size=4), st.sampled_from([None, 2]))
def test_any_json_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, rows: Any, indent: int | None) -> None:
    folder = tmp_path_factory.mktemp("json")
    (folder / "a.jsonl").write_bytes(jsonl(rows))
    (folder / "b.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert [row for row, _ in read(folder)] == [*rows, *rows]
