"""Files, folders, data sets and lists to rows, each with its provenance: ``file:line``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from lightning_sft.data.rows.csv_files import BrokenRow
from lightning_sft.data.rows.files import Line, row_of_table, skim_file
from lightning_sft.data.rows.folders import Folder, of_glob, sort_out
from lightning_sft.data.rows.in_memory import ByIndex, plain_row, refuse_mapping
from lightning_sft.data.rows.remote import File, RemoteFile, is_remote, matches, paths_below
from lightning_sft.types import InputError

Row = dict[str, Any] | list[Any]
Source = str | Sequence[str] | Iterable[Row] | Path  # Path last: jsonargparse would save a list as the text of one
Leaf = Callable[[], Iterator[tuple[Any, str]]]
"""One file, data set or list: gives its rows, unread (:func:`parsed` reads one), each with where it came from."""

Files = list[tuple[str, list[File]]]
"""The names that a source consists of, each with its files."""

_STEPS = {
    "ArrowExamplesIterable",
    "BufferShuffledExamplesIterable",
    "ExamplesIterable",
    "FilteredExamplesIterable",
    "FormattedExamplesIterable",
    "MappedExamplesIterable",
    "SelectColumnsIterable",
    "ShuffledDataSourcesArrowExamplesIterable",
    "ShuffledDataSourcesExamplesIterable",
}  # of an iterable data set, each of which makes one row, or none, of a row

_OF_TABLES = ("to_dicts", "to_pylist")  # rows of a table of polars, and of pyarrow

_HUB = re.compile(
    r"hf:(?P<name>[^:@]+)(?:@(?P<revision>[^:]+))?(?::(?P<config>[^:\[]+))??(?::(?P<split>[^:\[]+(?:\[.*\])?))?"
)


def read(source: Source) -> Iterator[tuple[Row, str]]:
    """The rows of a source, each with where it came from.

    Args:
        source: A file, a folder of files, a glob (``data/*.jsonl``), each also by an address that fsspec knows
            (``s3://bucket/train.jsonl``); a data set of the Hugging Face hub (``hf:owner/name:split``, in full
            ``hf:owner/name@revision:config:split``) or saved to disk; a sequence of those; or rows: a list of them, a
            ``datasets.Dataset``, a map-style data set of torch, or a table of pandas.

    Raises:
        InputError: When something is missing, empty, of an unknown kind, or not valid (with file and line).

    >>> list(read([{"prompt": "Hi", "completion": "Hello"}]))
    [({'prompt': 'Hi', 'completion': 'Hello'}, 'row 1')]
    """
    for leaf in leaves(source):
        for row, provenance in leaf():
            yield parsed(row, provenance), provenance


def as_rows(source: Any) -> Any:
    """A data set of torch or a table as a sequence of rows; anything else as it is.

    Args:
        source: What was given for data.

    >>> as_rows("train.jsonl"), as_rows([{"text": "a"}])
    ('train.jsonl', [{'text': 'a'}])
    """
    kind = type(source)
    if isinstance(source, (str, Sequence, Mapping)):
        return source
    if hasattr(source, "features"):  # a datasets.Dataset, whose rows may be tables
        form: Any = getattr(source, "format", None) or {}
        is_table = form.get("type") in ("pandas", "polars", "arrow")
        return source.with_format(None, columns=form["columns"]) if is_table else source
    if kind.__module__.partition(".")[0] == "pandas" and kind.__name__ == "DataFrame":
        return source.astype(object).where(source.notna(), None).to_dict("records")
    for name in _OF_TABLES:
        if callable(getattr(kind, name, None)):
            return getattr(source, name)()
    if hasattr(kind, "__getitem__") and hasattr(kind, "__len__") and not hasattr(kind, "__iter__"):
        return ByIndex(source)
    return source


def leaves(source: Source, streaming: bool = False) -> list[Leaf]:
    """The files, data sets or lists that a source consists of, in order.

    Args:
        source: File, folder, data set or list, as in :func:`read`.
        streaming: Whether a data set of the hub is read while it is downloaded.

    Raises:
        InputError: When something is missing.
    """
    if isinstance(source, (str, Path)):
        return _leaves_of_name(str(source), streaming)
    if isinstance(source, Mapping):
        refuse_mapping(source)
    if isinstance(source, Sequence) and source and all(isinstance(item, (str, Path)) for item in source):
        return [leaf for item in source for leaf in _leaves_of_name(str(item), streaming)]
    _refuse_split(source)
    return [partial(_rows_of_list, as_rows(source))]


def shards(source: Source) -> list[Leaf]:
    """The shards of an iterable data set, of the hub or of ``datasets``: together they have its rows, each once.

    Empty where it has one alone, is something else, or computes its rows from several at a time.

    Raises:
        InputError: When it is missing, or has already been split among ranks.
    """
    name = str(source) if isinstance(source, (str, Path)) else ""
    data: Any = data_set(name, streaming=True) if name else source
    _refuse_split(data)
    count = getattr(data, "num_shards", 1) if _is_row_by_row(getattr(data, "_ex_iterable", None)) else 1
    if count == 1:
        return []
    before = f"{name}:" if name else ""
    return [partial(_rows_of_shard, data.shard(count, i), f"{before}shard {i + 1}, ") for i in range(count)]


def _refuse_split(data: Any) -> None:
    if getattr(getattr(data, "_distributed", None), "world_size", 1) > 1:
        raise InputError(
            "The data set has been split by split_dataset_by_node. Give all of it: each rank takes its own rows of it."
        )


def _is_row_by_row(steps: Any) -> bool:
    """Whether each row of an iterable data set comes of one row of a shard, so that each can be read apart.

    Args:
        steps: What ``datasets`` makes of the rows, step after step: a step that is not known counts as one that does
            not (``take``, ``batch``, ``interleave_datasets``).
    """
    while steps is not None and type(steps).__name__ in _STEPS:
        if getattr(steps, "batched", False) or getattr(steps, "with_indices", False):
            return False
        if not hasattr(steps, "ex_iterable"):
            return True
        steps = steps.ex_iterable
    return False


def parsed(row: Any, provenance: str) -> Row:
    """A row of a :data:`Leaf`, read.

    Raises:
        InputError: When it is not valid JSON, or no row.
    """
    row = row.parse() if isinstance(row, (Line, BrokenRow)) else row
    if not isinstance(row, (dict, list)):
        raise InputError(
            f"{provenance}: a row must be an object with named keys, or a list of messages, got {type(row).__name__}."
        )
    return row


def files_of(name: str) -> list[File]:
    """The files that a path, a folder, a glob or an address stands for, in order of their names.

    Raises:
        InputError: When there is none.
    """
    if (folder := folder_of(name)) is not None:
        if not folder.read:
            raise InputError(f"There is no data file in the folder {name!r}, such as train.jsonl.")
        return [_file(f"{name.rstrip('/')}/{path}") for path in folder.read]
    if is_remote(name):
        found = matches(name)
    else:
        found = [name] if Path(name).is_file() else sorted(glob(name, recursive=True)) if has_magic(name) else []
    if not found:
        raise InputError(f"There is no data file {name!r} (looked in {Path.cwd()}).")
    return [_file(name)] if found == [name] else [file for match in found for file in files_of(match)]


def folder_of(name: str) -> Folder | None:
    """The files of a folder, if the name is that of one, and not of a data set that was saved to disk.

    Raises:
        InputError: When it is on another machine, which does not answer.
    """
    if is_remote(name):
        paths = paths_below(name)
    elif Path(name).is_dir() and not _is_saved(name):
        paths = [file.relative_to(name).as_posix() for file in Path(name).rglob("*") if file.is_file()]
    else:
        paths = None
    return None if paths is None else sort_out(name, paths)


def folders_of(source: Source) -> list[Folder]:
    """The folders among the names that a source consists of."""
    return [folder for name in _names(source) or [] if (folder := folder_of(name)) is not None]


def globs_of(source: Source) -> list[Folder]:
    """The globs among the names that a source consists of, with their files."""
    names = [name for name in _names(source) or [] if has_magic(name) and folder_of(name) is None]
    found = {name: [str(file) for file in files_of(name)] for name in names}
    return [of_glob(name, files) for name, files in found.items() if files != [name]]


def files_behind(source: Source) -> Files | None:
    """The names that a source consists of, each with its files; ``None`` where it is rows in memory.

    Raises:
        InputError: When one is missing.
    """
    if (names := _names(source)) is None:
        return None
    found: Files = []
    for name in names:
        data = data_set(name)
        files: list[File] = (
            [Path(file["filename"]) for file in data.cache_files] if data is not None else files_of(name)
        )
        found.append((name, files))
    return found


def size_of(files: Files) -> int:
    """Bytes of the files of a source."""
    return sum(file.stat().st_size for _, own in files for file in own)


def data_set(name: str, streaming: bool = False) -> Any:
    """The Hugging Face data set that a name stands for, of the hub or on disk; ``None`` where it stands for files.

    Raises:
        InputError: When it cannot be loaded, or has several splits.
    """
    on_disk = _is_saved(name)
    if not on_disk and (is_remote(name) or not name.startswith("hf:")):
        return None
    try:
        data = _from_disk(name) if on_disk else _from_hub(name, streaming)
    except InputError:
        raise
    except Exception as error:  # of datasets, the hub, the network, Arrow, the disk
        where = f"in the folder {name!r}" if on_disk else repr(name)
        raise InputError(f"The data set {where} cannot be loaded: {error}") from error
    if isinstance(data, Mapping):
        if len(data) != 1:
            separator = "/" if on_disk else ":"
            raise InputError(f"{name!r} has the splits {sorted(data)}: name one, {name}{separator}{sorted(data)[-1]}.")
        [data] = data.values()
    return data


def _names(source: Source) -> list[str] | None:
    """The names that a source consists of; ``None`` where it is rows."""
    names = [source] if isinstance(source, (str, Path)) else source
    is_named = isinstance(names, (list, tuple)) and names and all(isinstance(name, (str, Path)) for name in names)
    return list(map(str, names)) if is_named else None


def _file(name: str) -> File:
    return RemoteFile(name) if is_remote(name) else Path(name)


def _is_saved(name: str) -> bool:
    """Whether a folder is a data set that was saved to disk."""
    return any((Path(name) / file).is_file() for file in ("dataset_info.json", "dataset_dict.json"))


def _leaves_of_name(name: str, streaming: bool) -> list[Leaf]:
    if (data := data_set(name, streaming)) is not None:
        return [partial(_rows_of_data_set, name, data)]
    return [partial(skim_file, path) for path in files_of(name)]


def _from_hub(name: str, streaming: bool) -> Any:
    from datasets import load_dataset

    parts = _HUB.fullmatch(name)
    if parts is None:
        raise InputError(f"{name!r} names no data set: expected hf:owner/name@revision:config:split.")
    settings: dict[str, Any] = {"streaming": True} if streaming else {}
    if parts["revision"]:
        settings["revision"] = parts["revision"]
    return load_dataset(parts["name"], parts["config"], split=parts["split"], **settings)


def _from_disk(name: str) -> Any:
    from datasets import load_from_disk

    return load_from_disk(name)


def _rows_of_data_set(name: str, data: Any) -> Iterator[tuple[Any, str]]:
    number = 0
    for number, row in enumerate(data, 1):
        yield row_of_table(row), f"{name}:row {number}"
    if not number:
        raise InputError(f"The data set {name!r} has no rows.")


def _rows_of_shard(data: Any, before: str) -> Iterator[tuple[Any, str]]:
    for number, row in enumerate(data, 1):
        yield row_of_table(plain_row(row)), f"{before}row {number}"


def _rows_of_list(rows: Iterable[Any]) -> Iterator[tuple[Any, str]]:
    from_table = hasattr(rows, "features")  # a datasets.Dataset
    for number, row in enumerate(rows, 1):
        yield row_of_table(plain_row(row)) if from_table else plain_row(row), f"row {number}"
