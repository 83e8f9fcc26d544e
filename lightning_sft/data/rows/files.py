"""One data file to rows: JSONL, JSON, CSV, TSV and text (plain, gz, bz2, xz or zst), Parquet and Arrow.

JSON is read by the json module and never through Arrow, which gives all rows one schema: there, a key that one row has
becomes a null in every other. In Parquet and Arrow that has already happened, so keys without a value are left out
within a column.
Whatever a file holds, it is read in bounded memory: a row has at most :data:`MAX_ROW` bytes, and a packed file unpacks
to at most :data:`MAX_EXPANSION` times its size.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from math import inf
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

from lightning_sft.data.rows import strict_json
from lightning_sft.data.rows.csv_files import BrokenRow, rows_of_csv
from lightning_sft.data.rows.remote import File
from lightning_sft.types import InputError

MAX_ROW = 64 << 20
"""Bytes of a row, some 16 million tokens."""

MAX_EXPANSION = 200
"""How many times its size a packed file may unpack to; natural text has a factor of 3 to 20."""

_FREE = 1 << 30  # bytes that any file may unpack to
_BLOCK = 1 << 20  # bytes that are read at once
_AT_A_TIME = 64  # rows of a table: a dictionary may hold each of them once
_UTF16 = (BOM_UTF16_LE, BOM_UTF16_BE, b"{\0", b"\0{", b"[\0", b"\0[")  # how a text file of it begins
_BEFORE_PLACE = re.compile(r"( starting)? at$")  # of what json's messages end in
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")


class Line:
    """A row that is still a line of JSON: who needs another row has not parsed this one.

    Args:
        content: Bytes of the line.
        path: File of the file.
        number: Number of the row, from 1.
    """

    def __init__(self, content: bytes, path: File, number: int) -> None:
        self.content, self.path, self.number = content, path, number

    def parse(self) -> Any:
        """The value of the line.

        Raises:
            InputError: When it is not valid JSON, or not UTF-8.
        """
        try:
            return strict_json.loads(_decoded(self.content, self.path, self.number))
        except InputError:
            raise
        except ValueError as error:
            if self.number == 1 and self.content.strip() in (b"[", b"{"):
                raise InputError(
                    f"{self.path}:1: not valid JSON: the line is {self.content.strip().decode()!r} alone, and each "
                    "line of JSONL is a row. Name a file of JSON over several lines .json."
                ) from error
            raise _not_json(self.path, self.number, error) from error


def read_file(path: File) -> Iterator[tuple[Any, str]]:
    """The rows of a file, each with its place: ``file:line``, or ``file:row number`` in Parquet and Arrow, and where
    several rows of JSON stand on one line.

    Raises:
        InputError: When the file is of an unknown kind, cannot be read, or has no rows.
    """
    for row, place in skim_file(path):
        yield row.parse() if isinstance(row, (Line, BrokenRow)) else row, place


def skim_file(path: File) -> Iterator[tuple[Any, str]]:
    """The same, but a row of JSONL is a :class:`Line`, and a broken one of CSV a :class:`BrokenRow`."""
    kind = kind_of(path)
    if kind is None:
        raise InputError(
            f"{path}: a data file must end in {', '.join([*_TEXT, *_TABLES])}; the first {len(_TEXT)} may be packed: "
            f"with {', '.join(_PACKED)} after it."
        )
    empty = True
    try:
        for row, place in {**_TEXT, **_TABLES}[kind](path):
            empty = False
            yield row, f"{path}:{place}"
    except InputError:
        raise
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, NotImplementedError) as error:  # the last: Arrow
        raise InputError(f"{path}: cannot be read: {error}") from error
    if empty:
        raise InputError(f"{path}: the file has no rows.")


def kind_of(path: File | PurePath) -> str | None:
    """The suffix that tells how to read a file, or ``None`` where it is no data file."""
    *_, before, last = "", "", *(suffix.lower() for suffix in path.suffixes)
    if last in _PACKED:
        return before if before in _TEXT else None
    return last if last in _TEXT or last in _TABLES else None


def without_nulls(value: Any) -> Any:
    """The same without the keys whose value is ``None``: in a table every row has the keys of all rows.

    >>> without_nulls({"city": "Rome", "days": None, "stops": [{"at": None}, None]})
    {'city': 'Rome', 'stops': [{}, None]}
    """
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def row_of_table(row: Any) -> Any:
    """A row of a table: its columns keep a null, which is a cell without a value, and nothing inside of them does.

    >>> row_of_table({"prompt": None, "tools": [{"name": "f", "strict": None}]})
    {'prompt': None, 'tools': [{'name': 'f'}]}
    """
    return {key: without_nulls(value) for key, value in row.items()}


def _read_jsonl(path: File) -> Iterator[tuple[Line, int]]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield Line(line, path, number), number


def _read_text(path: File) -> Iterator[tuple[Any, int]]:
    """Each line as a text of its own, as the loader ``text`` of datasets has it."""
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                yield {"text": _decoded(line, path, number).rstrip("\r\n")}, number
            except InputError as error:
                yield BrokenRow(error), number


def _read_json(path: File) -> Iterator[tuple[Any, int | str]]:
    """The elements of a list one by one, with the line on which each begins; or objects that follow each other.

    Where two rows stand on the first line that has any, as in a file without line ends, each has its number for a
    place; elsewhere a row on the line of the one before does.
    """
    text = _text(path)
    at, line, counted, before, number, by_number = _skip(text, 0), 1, 0, 0, 0, False
    is_list = text[at : at + 1] == "["
    at = _skip(text, at + is_list)
    if is_list and text[at : at + 1] == "]":
        return
    while at < len(text):
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = strict_json.raw_decode(text, at)
            if at - counted > MAX_ROW:
                raise _too_long(f"{path}:{line}")
            at = _skip(text, at)
            if is_list:
                at, closed = _skip(text, at + 1), text[at : at + 1]
                if closed not in (",", "]") or (closed == "]") != (at == len(text)):
                    raise json.JSONDecodeError("expected a comma or the end of the list", text, at - 1)
        except ValueError as error:
            pos = min(getattr(error, "pos", 0), len(text.rstrip()))
            raise _not_json(path, text.count("\n", 0, pos) + 1 if pos else line, error) from error
        number += 1
        if number == 1:
            by_number = at < len(text) and "\n" not in text[counted:at]
        yield row, line if line > before and not by_number else f"row {number}"
        before = line


def _read_csv(path: File, delimiter: str = ",") -> Iterator[tuple[Any, int]]:
    return rows_of_csv(path, _lines(path), lambda line, number: _decoded(line, path, number), delimiter, MAX_ROW)


def _read_parquet(path: File) -> Iterator[tuple[Any, str]]:
    from pyarrow import parquet

    settings = {"pre_buffer": False, "buffer_size": _BLOCK}  # else whole groups of rows are in memory
    opener = nullcontext(path) if isinstance(path, Path) else path.open("rb")
    with opener as opened, parquet.ParquetFile(opened, **settings) as file:
        groups = map(file.metadata.row_group, range(file.num_row_groups))
        if sum(group.total_byte_size for group in groups) > _most_unpacked(path):
            raise _expands(path)
        yield from _rows_of(path, file.schema_arrow, file.iter_batches(_AT_A_TIME))


def _read_arrow(path: File) -> Iterator[tuple[Any, str]]:
    from pyarrow import PythonFile, ipc, memory_map

    with memory_map(str(path)) if isinstance(path, Path) else PythonFile(path.open("rb"), "r") as file:
        if file.read(6) == b"ARROW1":
            table = ipc.open_file(file)
            batches = (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            file.seek(0)
            batches = table = ipc.open_stream(file)
        yield from _rows_of(path, table.schema, batches)


def _rows_of(path: File, schema: Any, batches: Any) -> Iterator[tuple[Any, str]]:
    if len(set(schema.names)) < len(schema.names):
        raise InputError(f"{path}: two columns have the same name: {schema.names}.")
    before, unpacked, most = 0, 0, _most_unpacked(path)
    few = (batch.slice(begin, _AT_A_TIME) for batch in batches for begin in range(0, len(batch), _AT_A_TIME))
    for batch in map(_without_dictionaries, few):
        if batch.nbytes > MAX_ROW and any(batch.slice(i, 1).nbytes > MAX_ROW for i in range(len(batch))):
            raise _too_long(f"{path}: after row {before}")
        unpacked += batch.nbytes
        if unpacked > most:
            raise _expands(path)
        for number, row in enumerate(batch.to_pylist(), before + 1):
            yield row_of_table(row), f"row {number}"
        before += len(batch)


def _without_dictionaries(batch: Any) -> Any:
    """A record batch whose columns have their own values: so its size is that of its rows."""
    if not any(hasattr(column, "dictionary_decode") for column in batch.columns):
        return batch
    columns = [c.dictionary_decode() if hasattr(c, "dictionary_decode") else c for c in batch.columns]
    return type(batch).from_arrays(columns, names=batch.schema.names)


def _lines(path: File) -> Iterator[bytes]:
    """The lines of a text file, with their ends and without byte order marks: files put together have several."""
    unpacked, most = 0, _most_unpacked(path)
    with _open(path) as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_ROW + 1), b""), 1):
            if len(line) > MAX_ROW:
                raise _too_long(f"{path}:{number}")
            unpacked += len(line)
            if unpacked > most:
                raise _expands(path)
            if number == 1:
                _check_utf16(path, line)
            yield line.removeprefix(BOM_UTF8)


def _decoded(line: bytes, path: File, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, error, error.start) from error


def _text(path: File) -> str:
    """All of a text file, whose lines may be of any length: without spaces, a list of JSON is one line."""
    blocks, most = [], _most_unpacked(path)
    with _open(path) as file:
        for block in iter(partial(file.read, _BLOCK), b""):
            blocks.append(block)
            most -= len(block)
            if most < 0:
                raise _expands(path)
    content = b"".join(blocks)
    _check_utf16(path, content)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise _not_utf8(path, number, error, error.start - content.rfind(b"\n", 0, error.start) - 1) from error


@contextmanager
def _open(path: File) -> Iterator[BinaryIO]:
    """The file, unpacked where it is packed."""
    unpack = _PACKED.get(path.suffix.lower())
    with path.open("rb") as file:
        if unpack is None:
            yield file
        else:
            with unpack(file) as unpacked:
                yield unpacked


def _zst(file: BinaryIO) -> BinaryIO:
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise NotImplementedError("this build of pyarrow cannot read zst. Get one that can: pip install -U pyarrow")
    return cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd")))


def _most_unpacked(path: File) -> float:
    """Bytes that a file may have when it is unpacked; a table always counts as packed."""
    return inf if path.suffix.lower() in _TEXT else max(_FREE, MAX_EXPANSION * path.stat().st_size)


def _expands(path: File) -> InputError:
    return InputError(
        f"{path}: it unpacks to more than {MAX_EXPANSION} times its size. If that is as it should be, unpack it to a "
        ".jsonl file first."
    )


def _check_utf16(path: File, content: bytes) -> None:
    """Check the beginning of a text file.

    Raises:
        InputError: When it is that of UTF-16, as Windows writes it.
    """
    if content.startswith(_UTF16):
        raise InputError(
            f"{path}: UTF-16 text, and only UTF-8 is read. Save the file as UTF-8, or convert it: "
            "iconv -f UTF-16 -t UTF-8 OLD > NEW."
        )


def _not_utf8(path: File, line: int, error: UnicodeDecodeError, at: int) -> InputError:
    return InputError(
        f"{path}:{line}: not UTF-8 text ({error.reason} at byte {at} of the line). Save the file as UTF-8."
    )


def _too_long(where: str) -> InputError:
    return InputError(f"{where}: the row is longer than {MAX_ROW >> 20} MiB. Cut it into several, or remove it.")


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space is not None
    return space.end()


def _not_json(path: File, line: int, error: ValueError) -> InputError:
    if not isinstance(error, json.JSONDecodeError):
        return InputError(f"{path}:{line}: not valid JSON: {error}.")
    text, what = error.doc.rstrip(), _BEFORE_PLACE.sub("", error.msg)
    at = min(error.pos, len(text))  # a value that is missing is looked for behind the end of the line
    column = at - text.rfind("\n", 0, at)
    if at == len(text) or what.startswith("Unterminated"):
        what = f"it is cut off, or a bracket or quotation mark is left open: {what}"
    elif "control character" in what:
        what = f"a string has a line break or another control character, which JSON writes as {_escaped(text[at])}"
    elif what == "Extra data" and text[at:] == ",":
        what = "a comma follows the row. Remove it: each line of JSONL is a row alone, without commas between rows"
    elif what == "Extra data" and "\r" in text[:at]:
        what = "lines end in \\r alone, as on old Macs. Convert the file: tr '\\r' '\\n' < OLD > NEW"
    elif what == "Extra data":
        what = "something follows the row, and each line of JSONL is a row alone"
    return InputError(f"{path}:{line}: not valid JSON: {what} (column {column}).")


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1]


_Reader = Callable[[File], Iterator[tuple[Any, Any]]]
_TEXT: dict[str, _Reader] = {
    **{".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json},
    **{".csv": _read_csv, ".tsv": partial(_read_csv, delimiter="\t"), ".txt": _read_text},
}
_TABLES: dict[str, _Reader] = {".parquet": _read_parquet, ".arrow": _read_arrow, ".ipc": _read_arrow}
_PACKED: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zst}
