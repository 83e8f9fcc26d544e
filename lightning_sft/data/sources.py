"""Files and lists to rows, each with its provenance: ``file:line``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_sft.types import InputError

Row = dict[str, Any]
Source = str | Path | Sequence[str] | Sequence[Row]


def read(source: Source) -> Iterator[tuple[Row, str]]:
    """The rows of one or several JSONL or JSON files, or of a list, each with where it came from.

    Args:
        source: A ``.jsonl`` file (one object a line), a ``.json`` file (a list of objects), several of them, or rows.

    Raises:
        InputError: When a file is missing, empty, of an unknown kind, or not valid JSON (with file and line).

    >>> list(read([{"prompt": "Hi", "completion": "Hello"}]))
    [({'prompt': 'Hi', 'completion': 'Hello'}, 'row 1')]
    """
    if isinstance(source, (str, Path)):
        yield from _read_file(Path(source))
        return
    for number, item in enumerate(source, 1):
        if isinstance(item, (str, Path)):
            yield from _read_file(Path(item))
        else:
            yield _checked(item, f"row {number}"), f"row {number}"


def _read_file(path: Path) -> Iterator[tuple[Row, str]]:
    readers = {".jsonl": _read_lines, ".json": _read_array}
    if path.suffix not in readers:
        raise InputError(f"{path}: a data file must end in .jsonl or .json.")
    if not path.is_file():
        raise InputError(f"There is no data file {str(path)!r} (looked in {Path.cwd()}).")
    empty = True
    try:
        for row, line in readers[path.suffix](path):
            empty = False
            yield _checked(row, f"{path}:{line}"), f"{path}:{line}"
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
    if empty:
        raise InputError(f"{path}: the file has no rows.")


def _read_lines(path: Path) -> Iterator[tuple[Any, int]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line), number
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}:{number}: not valid JSON: {error.msg} (column {error.colno}).") from error


def _read_array(path: Path) -> Iterator[tuple[Any, int]]:
    """The elements of a JSON list one by one, with the line on which each begins; a lone object is one row."""
    text = path.read_text(encoding="utf-8-sig")
    decoder, whitespace = json.JSONDecoder(), " \t\r\n"
    at = len(text) - len(text.lstrip(whitespace))
    is_list = text[at : at + 1] == "["
    at, line, counted = at + is_list, 1, 0
    while at < len(text):
        at += len(text[at:]) - len(text[at:].lstrip(whitespace + ("," if is_list else "")))
        if at >= len(text) or text[at] == "]":
            break
        line, counted = line + text.count("\n", counted, at), at
        try:
            element, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno}).") from error
        yield element, line


def _checked(row: Any, provenance: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{provenance}: a row must be a JSON object, got {type(row).__name__}.")
    return row
