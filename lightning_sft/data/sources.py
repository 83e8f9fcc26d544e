"""Files, folders, data sets and lists to rows, each with its provenance: ``file:line``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from lightning_sft.data.files import kind_of, read_file, without_nulls
from lightning_sft.types import InputError

Row = dict[str, Any] | list[Any]
Source = str | Sequence[str] | Iterable[Row] | Path  # Path last: jsonargparse would save a list as the text of one

_HUB = re.compile(r"hf:(?P<name>[^:]+)(?::(?P<config>[^:\[]+))??(?::(?P<split>[^:\[]+(?:\[.*\])?))?")


def read(source: Source) -> Iterator[tuple[Row, str]]:
    """The rows of a source, each with where it came from.

    Args:
        source: A file, a folder of files, a glob (``data/*.jsonl``), a data set of the Hugging Face hub
            (``hf:owner/name:split``, with ``:config`` before the split where there are several) or saved to disk, a
            sequence of those, or rows: a list of them or a ``datasets.Dataset``.

    Raises:
        InputError: When something is missing, empty, of an unknown kind, or not valid (with file and line).

    >>> list(read([{"prompt": "Hi", "completion": "Hello"}]))
    [({'prompt': 'Hi', 'completion': 'Hello'}, 'row 1')]
    """
    if isinstance(source, (str, Path)):
        yield from _read_name(str(source))
        return
    if isinstance(source, Mapping):
        raise InputError(f"The data has the splits {sorted(map(str, source))}: give one of them, data['train'].")
    from_table = hasattr(source, "features")  # a datasets.Dataset
    for number, item in enumerate(source, 1):
        if isinstance(item, (str, Path)):
            yield from _read_name(str(item))
        else:
            yield _checked(without_nulls(item) if from_table else item, f"row {number}"), f"row {number}"


def _read_name(name: str) -> Iterator[tuple[Row, str]]:
    if name.startswith("hf:"):
        yield from _read_data_set(name, _from_hub(name))
    elif (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
        yield from _read_data_set(name, _from_disk(name))
    else:
        for path in _files(name):
            for row, provenance in read_file(path):
                yield _checked(row, provenance), provenance


def _files(name: str) -> list[Path]:
    """The files that a path, a folder or a glob stands for, in order of their names."""
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file() and kind_of(file)]
        if not found:
            raise InputError(f"There is no data file in the folder {name!r}, such as train.jsonl.")
        return found
    matches = sorted(glob(name, recursive=True)) if has_magic(name) else []
    if not matches:
        raise InputError(f"There is no data file {name!r} (looked in {Path.cwd()}).")
    return [file for match in matches for file in _files(match)]


def _from_hub(name: str) -> Any:
    from datasets import load_dataset

    parts = _HUB.fullmatch(name)
    if parts is None:
        raise InputError(f"{name!r} names no data set: expected hf:owner/name:split.")
    try:
        return load_dataset(parts["name"], parts["config"], split=parts["split"])
    except Exception as error:  # of datasets, the hub, the network
        raise InputError(f"The data set {name!r} cannot be loaded: {error}") from error


def _from_disk(name: str) -> Any:
    from datasets import load_from_disk

    try:
        return load_from_disk(name)
    except Exception as error:  # of datasets, Arrow, the disk
        raise InputError(f"The data set in the folder {name!r} cannot be loaded: {error}") from error


def _read_data_set(name: str, data: Any) -> Iterator[tuple[Row, str]]:
    if isinstance(data, Mapping):
        if len(data) != 1:
            separator = ":" if name.startswith("hf:") else "/"
            raise InputError(f"{name!r} has the splits {sorted(data)}: name one, {name}{separator}{sorted(data)[-1]}.")
        [data] = data.values()
    if not len(data):
        raise InputError(f"The data set {name!r} has no rows.")
    for number, row in enumerate(data, 1):
        yield without_nulls(row), f"{name}:row {number}"


def _checked(row: Any, provenance: str) -> Row:
    if not isinstance(row, (dict, list)):
        raise InputError(
            f"{provenance}: a row must be an object with named keys, or a list of messages, got {type(row).__name__}."
        )
    return row
