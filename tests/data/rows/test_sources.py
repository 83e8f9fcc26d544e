from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from datasets import IterableDataset
from jsonargparse import ArgumentParser
from pyarrow import feather, parquet

from lightning_sft.data.rows.sources import Source, files_behind, files_of, folder_of, leaves, read
from lightning_sft.data.tokens.cache import key_of
from lightning_sft.data.tokens.encode_rows import EncodingConfig
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.types import InputError


def test_several_files_follow_each_other(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for number, path in enumerate(paths):
        path.write_text(json.dumps({"a": number}))
    assert [row["a"] for row, _ in read([str(path) for path in paths])] == [0, 1]


def test_a_missing_file_is_named_with_where_it_was_looked_for() -> None:
    with pytest.raises(InputError, match=r"no data file 'nowhere\.jsonl' \(looked in /"):
        list(read("nowhere.jsonl"))


def test_folders_and_globs_are_read_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data = json.dumps({"name": name}).encode()
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


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", "1\n"), ("a.json", "[1]")])
def test_what_is_no_row_is_refused_with_its_place(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"{name}:1: a row must be an object with named keys, or a list of messages"):
        list(read(tmp_path / name))


def test_data_sets_give_rows_without_the_nulls_that_the_schema_adds(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    rows = [{"args": {"city": "Rome"}}, {"args": {"day": 3}}]
    data = Dataset.from_list(rows)
    assert list(read(data)) == [(row, f"row {number}") for number, row in enumerate(rows, 1)]
    assert [row for row, _ in read(data.to_iterable_dataset())] == rows
    folder = tmp_path / "saved"
    data.save_to_disk(str(folder))
    assert list(read(folder)) == [(row, f"{folder}:row {number}") for number, row in enumerate(rows, 1)]
    several = DatasetDict({"train": data, "test": data})
    with pytest.raises(InputError, match=r"has the splits \['test', 'train'\]: give one of them"):
        list(read(several))
    several.save_to_disk(str(tmp_path / "several"))
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
        ("hf:owner/name@v1.0:main:train", "main", "train"),
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
    revision = {"revision": "v1.0"} if "@" in name else {}
    assert calls == [(("owner/name", config), {"split": split, **revision})]  # and no trust_remote_code


def test_a_data_set_of_the_hub_is_read_while_it_is_downloaded_for_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return IterableDataset.from_generator(lambda: iter([{"a": 1, "b": None}, {"a": 2, "b": 3}]))

    monkeypatch.setattr("datasets.load_dataset", load)
    [leaf] = leaves("hf:owner/name:train", streaming=True)
    assert list(leaf()) == [
        ({"a": 1, "b": None}, "hf:owner/name:train:row 1"),
        ({"a": 2, "b": 3}, "hf:owner/name:train:row 2"),
    ]
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


@pytest.mark.parametrize(
    ("paths", "read", "left_out"),
    [
        (["train.jsonl", "test.jsonl", "validation.json"], ["train.jsonl"], ["test.jsonl", "validation.json"]),
        (["a/train-0.parquet", "a/test-0.parquet"], ["a/train-0.parquet"], ["a/test-0.parquet"]),
        (["data/part.jsonl", "Test/part.jsonl"], ["data/part.jsonl"], ["Test/part.jsonl"]),
        (["contest.jsonl", "latest.jsonl", "evaluate.jsonl"], ["contest.jsonl", "evaluate.jsonl", "latest.jsonl"], []),
        (["a.jsonl", ".ipynb_checkpoints/a.jsonl", "._a.jsonl", "__MACOSX/a.jsonl", "config.json"], ["a.jsonl"], []),
        (["a.JSONL", "README.txt"], ["a.JSONL"], ["README.txt"]),
        (["a.txt", "b.txt.gz"], ["a.txt", "b.txt.gz"], []),
        (["test.jsonl"], ["test.jsonl"], []),
    ],
)
@pytest.mark.parametrize("protocol", ["", "memory://"])
def test_of_a_folder_the_training_files_are_read(
    tmp_path: Path, paths: list[str], read: list[str], left_out: list[str], protocol: str
) -> None:
    name = f"{protocol}{tmp_path}"
    for path in paths:
        with fsspec.open(f"{name}/{path}", "wt", auto_mkdir=True) as file:
            file.write("a\n")
    folder = folder_of(name)
    assert folder is not None
    assert (folder.read, folder.left_out) == (read, left_out)
    assert [str(file) for file in files_of(name)] == [f"{name}/{path}" for path in read]


def test_a_folder_inside_a_hidden_one_may_be_named(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "test"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_text("{}")
    assert files_of(str(folder)) == [folder / "a.jsonl"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "a.arrow", "a.jsonl.zst"])
def test_files_of_another_machine_are_read_as_those_of_this_one(tmp_path: Path, name: str) -> None:
    table = pa.table({"a": ["x", "y"]})
    writers = {"a.parquet": parquet.write_table, "a.arrow": feather.write_feather}
    text = {"a.json": '[{"a": "x"}, {"a": "y"}]', "a.csv": "a\nx\ny\n"}.get(name, '{"a": "x"}\n{"a": "y"}\n').encode()
    packed = {"a.jsonl.gz": gzip.compress, "a.jsonl.zst": lambda text: pa.compress(text, "zstd", asbytes=True)}
    if name in writers:
        writers[name](table, str(tmp_path / name))
    else:
        (tmp_path / name).write_bytes(packed.get(name, bytes)(text))
    fsspec.filesystem("memory").pipe(f"/far/{name}", (tmp_path / name).read_bytes())
    here, there = list(read(str(tmp_path / name))), list(read(f"memory://far/{name}"))
    assert [row for row, _ in there] == [row for row, _ in here] == [{"a": "x"}, {"a": "y"}]
    assert [place.replace(f"memory://far/{name}", str(tmp_path / name)) for _, place in there] == [p for _, p in here]


def test_globs_and_missing_files_of_another_machine() -> None:
    system = fsspec.filesystem("memory")
    for name in ("b.jsonl", "a.jsonl"):
        system.pipe(f"/globs/{name}", b'{"a": 1}')
    assert [place for _, place in read("memory://globs/*.jsonl")] == [
        "memory:///globs/a.jsonl:1",
        "memory:///globs/b.jsonl:1",
    ]
    with pytest.raises(InputError, match=r"There is no data file 'memory://globs/c.jsonl'"):
        list(read("memory://globs/c.jsonl"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere://a.jsonl", "Protocol not known: nowhere"), ("dropbox://a.jsonl", "dropboxdrivefs")],
)
def test_a_protocol_that_cannot_be_read_is_one_error(name: str, message: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' cannot be read: .*{message}"):
        list(read(name))


def test_an_entry_of_the_cache_is_of_what_a_file_of_another_machine_holds() -> None:
    system, recipe = fsspec.filesystem("memory"), EncodingConfig(tiny_tokenizer())
    system.pipe("/cached/a.jsonl", b"x" * (1 << 20))
    files = files_behind("memory://cached/a.jsonl")
    key = key_of(files, recipe)
    system.pipe("/cached/a.jsonl", b"y" * (1 << 20))
    assert key is not None
    assert key_of(files, recipe) not in (None, key)
