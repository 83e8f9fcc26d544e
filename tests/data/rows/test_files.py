from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather, ipc, parquet

from lightning_sft.data.rows import files
from lightning_sft.data.rows.csv_files import BrokenRow
from lightning_sft.data.rows.files import read_file, skim_file
from lightning_sft.data.rows.messages import Converter
from lightning_sft.data.rows.sources import parsed
from lightning_sft.types import InputError


def test_each_line_of_jsonl_is_a_row_with_its_line_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": "é"}\n', encoding="utf-8")
    assert list(read_file(path)) == [({"a": 1}, f"{path}:1"), ({"a": "é"}, f"{path}:4")]


@pytest.mark.parametrize("indent", [None, 1])
def test_each_element_of_a_json_list_is_a_row_with_the_line_it_begins_on(tmp_path: Path, indent: int | None) -> None:
    rows = [{"a": [1, {"b": "]"}]}, {"a": 2}, {"a": 3}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
    got = list(read_file(path))
    assert [row for row, _ in got] == rows
    lines = [2, 10, 13] if indent else ["row 1", "row 2", "row 3"]
    assert [where for _, where in got] == [f"{path}:{line}" for line in lines]


def test_a_lone_json_object_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n{"a": 1}\n')
    assert list(read_file(path)) == [({"a": 1}, f"{path}:2")]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}', encoding="utf-8-sig")
    assert [row for row, _ in read_file(path)] == [{"a": 1}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '\ufeff{"a": 1}\n\ufeff{"a": 1}\n'),
        ("a.json", '\ufeff{"a": 1}\n\ufeff{"a": 1}\n'),
        ("a.csv", "\ufeffa\n1\n\ufeff1"),
    ],
)
def test_files_that_were_put_together_have_several_byte_order_marks(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert [{key: int(value) for key, value in row.items()} for row, _ in read_file(path)] == [{"a": 1}] * 2


BAD: list[tuple[str, Any, str]] = [
    ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl:2: not valid JSON: .* \(column 6"),
    ("a.jsonl", '{"a": 1}\n{"a": 2\n{"a": 3}\n', r"a\.jsonl:2: not valid JSON: .* \(column 8"),
    ("a.json", '[{"a": 1},\n {"a": 2\n\n', r"a\.json:2: not valid JSON: .* \(column 9"),
    ("a.json", '[{"a": 1},\n {"a" 2}]', r"a\.json:2: not valid JSON"),
    ("a.json", '[{"a": 1},\n {"a": 2', r"a\.json:2: not valid JSON"),
    ("a.jsonl", "", "has no rows"),
    ("a.json", "[]", "has no rows"),
    ("a.json", "", "has no rows"),
    (
        "a.md",
        "hello",
        r"must end in \.jsonl, \.ndjson, \.json, \.csv, \.tsv, \.txt, \.parquet, .*\.gz, \.bz2, \.xz, \.zst",
    ),
    ("a.txt", b"hello\n\xff", r"a\.txt:2: not UTF-8"),
    ("a.jsonl.xz", "hello", r"a\.jsonl\.xz: cannot be read"),
    ("a.jsonl.bz2", "hello", r"a\.jsonl\.bz2: cannot be read"),
    ("a.parquet.gz", "hello", r"must end in \.jsonl"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}', r"a\.jsonl:2: not UTF-8 text \(invalid start byte at byte 7 of the line\)"),
    ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', r"a\.json:2: not UTF-8"),
    ("a.csv", b"a\n\xff", r"a\.csv:2: not UTF-8"),
    ("a.json", '[{"a": 1} {"a": 2}]', r"a\.json:1: not valid JSON: expected a comma or the end of the list"),
    ("a.json", '[{"a": 1},]', r"a\.json:1: not valid JSON"),
    ("a.json", '[{"a": 1}]\n{"a": 2}', r"a\.json:1: not valid JSON: expected a comma or the end of the list"),
    ("a.json", '[{"a": 1},', r"a\.json:1: not valid JSON"),
    ("a.json", '{"a": 1},{"a": 2}', r"a\.json:1: not valid JSON"),
    ("a.jsonl", '{"a": 1}\n{"a": NaN}', r"a\.jsonl:2: not valid JSON: NaN is no JSON value, in the key 'a'"),
    ("a.jsonl", '{"b": 1, "score": NaN}', r"a\.jsonl:1: not valid JSON: NaN is no JSON value, in the key 'score'"),
    ("a.jsonl", '{"a": {"b": [1, [Infinity]]}, "c": NaN}', r"Infinity is no JSON value, in the key 'b'"),
    ("a.jsonl", '[{"b": 1e999}]', r"the number 1e999 is too large, in the key 'b'"),
    ("a.json", '[{"a": 1},\n{"a": -Infinity}]', r"a\.json:2: not valid JSON: -Infinity is no JSON value"),
    ("a.jsonl", '{"a": 1e999}', r"a\.jsonl:1: not valid JSON: the number 1e999 is too large"),
    ("a.jsonl", '{"a": {"b": 1, "c": 2, "b": 1}}', r"a\.jsonl:1: not valid JSON: the key 'b' is there twice"),
    ("a.json", '[\n\n{"a": 1, "a": 2}]', r"a\.json:3: not valid JSON: the key 'a' is there twice"),
    (
        "a.jsonl",
        '{"a": ' + "[" * 100 + "]" * 100 + "}",
        r"a\.jsonl:1: .* it is nested too deeply, more than 100",
    ),
    ("a.json", '[1, {"a": ' + "[" * 100 + "]" * 100 + "}]", r"a\.json:1: not valid JSON: it is nested too deeply"),
    ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: not valid JSON: it is nested too deeply"),
    (
        "a.jsonl",
        '[\n{"a": 1}\n]',
        r"a\.jsonl:1: .* the line is '\[' alone, .* Name a file of JSON over several lines .json",
    ),
    ("a.jsonl", '{\n"a": 1\n}', r"a\.jsonl:1: .* the line is '{' alone"),
    ("a.jsonl", "9" * 5_000, r"a\.jsonl:1: not valid JSON: an integer has thousands of digits\. Write"),
    ("a.json", '[{"a": ' + "9" * 5_000 + "}]", r"a\.json:1: not valid JSON: an integer has thousands of digits"),
    ("a.jsonl", '{"a": 1},\n{"a": 2},\n', r"a\.jsonl:1: not valid JSON: a comma follows the row\. .* \(column 9\)"),
    ("a.jsonl", '{"a": 1}\r{"a": 2}\r', r"a\.jsonl:1: not valid JSON: lines end in \\r alone, .* tr '\\r' '\\n' < OLD"),
    ("a.jsonl", '{"a": 1}{"a": 2}\r\n', r"a\.jsonl:1: not valid JSON: something follows the row, .* \(column 9\)"),
    *(
        (name, text.encode(code), rf"{name}: UTF-16 text, and only UTF-8 is read")
        for name, text in (("a.jsonl", '{"a": 1}\n{"a": 2}\n'), ("a.json", '[{"a": 1}]'), ("a.csv", "a,b\n1,2\n"))
        for code in ("utf-16", "utf-16-le", "utf-16-be")
        if name != "a.csv" or code == "utf-16"  # what has no mark is known by its bracket
    ),
    ("a.csv", "a,b,,\n1,2,,3\n", r"a\.csv:2: column 4 has a text and no name\. Quote texts with commas"),
    ("a.csv", "a,,a,\n1,2,3,\n", r"a\.csv:1: two columns have the same name"),
    ("a.jsonl", '{"a": "b", "c"\n', r"a\.jsonl:1: .* it is cut off, or .* \(column 15\)"),
    ("a.jsonl", '{"a": "b\n', r"a\.jsonl:1: .* it is cut off, .* \(column 9\)"),
    ("a.jsonl", '{"a": "b\tc"}\n', r"a string has a line break or .*, which JSON writes as \\t \(column 9\)"),
    ("a.json", '[{"a": 1},\n{"a": \n\n', r"a\.json:2: .* it is cut off, .* Expecting value \(column 6\)"),
    ("a.json", '[{"a": "x\ny"}]', r"a\.json:1: .*, which JSON writes as \\n \(column 10\)"),
    ("a.csv", "", "has no rows"),
    ("a.csv", "a,b\n", "has no rows"),
    ("a.csv", "a,b\n1,2\n3\n", r"a\.csv:3: the row has 1 cells, the header 2"),
    ("a.csv", "a,a\n1,2\n", r"a\.csv:1: two columns have the same name"),
    ("a.csv", 'a,b\n1,"2" 3\n', r"a\.csv:2: not valid CSV"),
    ("a.jsonl.gz", "hello", r"a\.jsonl\.gz: cannot be read: Not a gzipped file"),
    (
        "a.jsonl.gz",
        gzip.compress(b'{"a": 1}' * 9, mtime=0)[:-9],
        r"a\.jsonl\.gz: cannot be read: Compressed file ended",
    ),
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
        list(read_file(path))


ROWS = [{"a": "x", "b": "1"}, {"a": 'é "quoted"\n', "b": ""}]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL", "a.json", "a.csv", "a.tsv"])
@pytest.mark.parametrize("pack", ["", ".gz", ".GZ", ".bz2", ".xz", ".zst"])
def test_text_may_be_packed(tmp_path: Path, name: str, pack: str) -> None:
    text = {
        **dict.fromkeys(["a.jsonl", "a.ndjson", "a.JSONL"], jsonl(ROWS)),
        "a.tsv": 'a\tb\nx\t1\n"é ""quoted""\n"\t\n'.encode(),
        "a.json": json.dumps(ROWS).encode(),
        "a.csv": 'a,b\nx,1\n"é ""quoted""\n",\n'.encode(),
    }[name]
    packs: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        ".gz": gzip.compress,
        ".GZ": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
    }
    path = tmp_path / (name + pack)
    path.write_bytes(packs[pack](text))
    assert [row for row, _ in read_file(path)] == ROWS


def test_each_line_of_a_text_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffOnce upon\r\n\n  a time.\n".encode())
    assert list(read_file(path)) == [({"text": "Once upon"}, f"{path}:1"), ({"text": "  a time."}, f"{path}:3")]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n{"a": 3}\n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n{"a": 3}\n', r"a\.jsonl:2: not UTF-8"),
        ("a.csv", b"a\n1\n2,2\n3\n", r"a\.csv:3: the row has 2 cells, the header 1"),
    ],
)
def test_rows_after_one_that_cannot_be_read_are_there(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    first, broken, last = (row for row, _ in skim_file(tmp_path / name))
    assert [int(row["a"] if isinstance(row, dict) else row.parse()["a"]) for row in (first, last)] == [1, 3]
    with pytest.raises(InputError, match=reason):
        broken.parse()


def test_empty_columns_without_a_name_behind_the_others_are_ignored_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,,\nq,a,,\np,b, ,\nr,it goes, on,\n")
    convert, broken = Converter(), []
    for row, place in skim_file(path):
        if isinstance(row, BrokenRow):
            broken.append(place)
        else:
            assert [message["content"] for message in convert(row, place).messages] == [
                row["prompt"],
                row["completion"],
            ]
    assert (convert.ignored, broken) == ({"": 2}, [f"{path}:4"])


def test_the_first_row_of_a_table_takes_the_memory_of_a_few(tmp_path: Path) -> None:
    texts = [random.Random(i).randbytes(5_000).hex() for i in range(6_000)]  # 60 MB in one group of rows
    parquet.write_table(pyarrow.table({"a": texts}), tmp_path / "a.parquet")
    del texts
    before = pyarrow.total_allocated_bytes()
    reading = read_file(tmp_path / "a.parquet")
    next(reading)
    assert pyarrow.total_allocated_bytes() - before < 30_000_000  # 22 MB, and 81 where groups are read whole
    reading.close()  # type: ignore[attr-defined] # it is a generator


def test_a_packed_file_may_be_of_several_parts(tmp_path: Path) -> None:
    for name, pack in {
        "a.jsonl.gz": gzip.compress,
        "a.jsonl.zst": lambda d: pyarrow.compress(d, "zstd", asbytes=True),
    }.items():
        path = tmp_path / name
        path.write_bytes(pack(jsonl([{"a": 1}])) + pack(jsonl([{"a": 2}])))
        assert list(read_file(path)) == [({"a": 1}, f"{path}:1"), ({"a": 2}, f"{path}:2")]


def test_without_zst_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    monkeypatch.setattr(pyarrow, "Codec", SimpleNamespace(is_available=lambda name: False))
    with pytest.raises(InputError, match="pip install -U pyarrow"):
        list(read_file(tmp_path / "a.jsonl.zst"))


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ('[{"a": 1}, {"a": 2},\n{"a": 3}, {"a": 4}]', ["row 1", "row 2", "row 3", "row 4"]),
        ('[{"a": 1}]', ["1"]),
        ('[{"a": 1},\n {"a": 2}, {"a": 3}]', ["1", "2", "row 3"]),
        ('{"a": 1}\n{"a": 2}', ["1", "2"]),
        ('{"a": 1} {"a": 2}', ["row 1", "row 2"]),
    ],
)
def test_rows_of_json_on_one_line_are_all_named_by_their_number(tmp_path: Path, text: str, places: list[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    assert [place for _, place in read_file(path)] == [f"{path}:{place}" for place in places]


def skimmed(path: Path) -> list[Any]:
    """The rows of a file; of a broken one, its error."""
    found: list[Any] = []
    for row, _ in skim_file(path):
        try:
            found.append(parsed(row, ""))
        except InputError as error:
            found.append(str(error).removeprefix(str(path)))
    return found


@pytest.mark.parametrize(
    ("broken", "lines", "said"),
    [
        ('he said "hi",x', 1, None),  # a quotation mark within a bare cell is a character
        ('"he said "hi"",x', 1, "not valid CSV: ',' expected after '\"'"),
        ('"never closed,x', 1, "not valid CSV: "),
        ("\udcff,x", 1, "not UTF-8"),
        ("one", 1, "the row has 1 cells, the header 2"),
    ],
)
def test_a_broken_row_of_csv_costs_that_row_alone(tmp_path: Path, broken: str, lines: int, said: str | None) -> None:
    path = tmp_path / "a.csv"
    text = f'a,b\n1,2\n"two\nlines",3\n{broken}\n4,5\n\n"6",7\n8,9\n'
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    before, after = [{"a": "1", "b": "2"}, {"a": "two\nlines", "b": "3"}], [("4", "5"), ("6", "7"), ("8", "9")]
    rows = skimmed(path)
    assert rows[:2] == before
    assert rows[3:] == [{"a": a, "b": b} for a, b in after]
    assert rows[2] == {"a": 'he said "hi"', "b": "x"} if said is None else rows[2].startswith(f":5: {said}")


def test_a_line_of_text_that_is_not_utf_8_costs_that_row_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\xff\nthree\n")
    one, broken, three = skimmed(tmp_path / "a.txt")
    assert (one, three) == ({"text": "one"}, {"text": "three"})
    assert broken.startswith(":2: not UTF-8")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt;completion\nHi, you;Yo\n"),
        ("a.csv", 'sep=;\nprompt;completion\n"Hi, you";Yo\n'),
        ("a.csv", '"prompt"\t"completion"\n"Hi, you"\tYo\n'),
        ("a.csv", "prompt|completion\nHi, you|Yo\n"),
        ("a.tsv", 'prompt,completion\n"Hi, you",Yo\n'),
        ("a.tsv", "prompt\tcompletion\nHi, you\tYo\n"),
    ],
)
def test_what_separates_cells_is_seen_in_the_header(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert skimmed(tmp_path / name) == [{"prompt": "Hi, you", "completion": "Yo"}]


def test_the_line_of_a_csv_row_is_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\r\n"1\r\n1",2\r\n\r\n3,4\r\n')
    assert list(read_file(path)) == [({"a": "1\r\n1", "b": "2"}, f"{path}:2"), ({"a": "3", "b": "4"}, f"{path}:5")]


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a\n" + "x" * 200_000)
    [(row, _)] = read_file(tmp_path / "a.csv")
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
    assert list(read_file(path)) == [(row, f"{path}:row {number}") for number, row in enumerate(rows, 1)]


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_cannot_be_read_are_named(tmp_path: Path, name: str) -> None:
    TABLES[name](pyarrow.table({"a": pyarrow.array([], pyarrow.string())}), tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: the file has no rows"):
        list(read_file(tmp_path / name))
    TABLES[name](pyarrow.Table.from_arrays([[1], [2]], names=["a", "a"]), tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: two columns have the same name"):
        list(read_file(tmp_path / name))
    TABLES[name](pyarrow.table({"a": ["x" * 500] * 9}), tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{name}: cannot be read"):
        list(read_file(tmp_path / name))


def test_json_keeps_values_of_different_types_and_their_nulls(tmp_path: Path) -> None:
    rows = [{"a": {"x": 1, "y": None}}, {"a": {"x": "1"}}, {"a": {"x": [1.5, True]}}]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    assert [row for row, _ in read_file(tmp_path / "a.jsonl")] == rows


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(st.lists(st.dictionaries(st.text(), JSON, max_size=3), min_size=1, max_size=4), st.sampled_from([None, 2]))
def test_any_json_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, rows: Any, indent: int | None) -> None:
    folder = tmp_path_factory.mktemp("json")
    (folder / "a.jsonl").write_bytes(jsonl(rows))
    (folder / "b.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    for name in ("a.jsonl", "b.json"):
        assert [row for row, _ in read_file(folder / name)] == rows


def test_as_deep_as_is_allowed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": ' + "[" * 99 + "]" * 99 + ', "b": [' + "[]," * 200 + "[]]}")
    [(row, _)] = read_file(path)
    assert len(row["b"]) == 201


def test_a_key_that_is_there_twice_among_many_is_found_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{" + ",".join(f'"{i}": 1' for i in range(200_000)) + ', "199999": 2}')
    begin = time.process_time()
    with pytest.raises(InputError, match="the key '199999' is there twice"):
        list(read_file(path))
    assert time.process_time() - begin < 20  # quadratic time would be an hour


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_row_that_is_too_long_is_refused_before_it_is_parsed(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_ROW", 1 << 20)
    write(tmp_path / name, [{"a": "x"}, {"a": "x" * 1_000_000}])
    assert len(list(read_file(tmp_path / name))) == 2
    write(tmp_path / name, [{"a": "x"}, {"a": "x" * 1_100_000}])
    with pytest.raises(InputError, match=r"longer than 1 MiB|field larger than field limit"):
        list(read_file(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_FREE", 1 << 20)
    rows = [{"a": "x" * 50_000, "b": i} for i in range(400)]
    write(tmp_path / name, rows)
    assert (tmp_path / name).stat().st_size * 200 < 20_000_000
    with pytest.raises(InputError, match="it unpacks to more than 200 times its size"):
        list(read_file(tmp_path / name))
    monkeypatch.setattr(files, "_FREE", 1 << 30)
    assert len(list(read_file(tmp_path / name))) == 400


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_dictionary_whose_rows_are_each_a_long_text_takes_the_memory_of_a_few(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, [{"a": "x" * 1_000_000}] * 500)  # 500 MB of rows in a file of some megabytes
    tracemalloc.start()
    reading = read_file(tmp_path / name)
    for _ in range(10):
        next(reading)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    reading.close()  # type: ignore[attr-defined] # it is a generator
    assert peak < 200_000_000


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as a file of the kind that its name says."""
    if path.suffix in (".parquet", ".arrow"):
        table = pyarrow.table({"a": pyarrow.array([row["a"] for row in rows]).dictionary_encode()})
        if path.suffix == ".parquet":
            parquet.write_table(table, path)
        else:
            with ipc.new_stream(str(path), table.schema) as file:
                file.write_table(table)
        return
    if ".csv" in path.name:
        text = "a\n" + "".join(f"{row['a']}\n" for row in rows)
    else:
        text = "\n".join(map(json.dumps, rows)) if ".jsonl" in path.name else json.dumps(rows, indent=0)
    if path.suffix == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as out:
            out.write(text.encode())
    else:
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_list_of_json_may_be_one_line_of_any_length(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_ROW", 1000)
    path, content = tmp_path / f"a.json{suffix}", json.dumps([{"text": "é" * 100}] * 100).encode()
    path.write_bytes(gzip.compress(content) if suffix else content)
    assert len(list(read_file(path))) == 100
