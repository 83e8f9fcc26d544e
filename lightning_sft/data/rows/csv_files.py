"""CSV and TSV to rows: a broken row costs that row alone, and what stands between cells is seen in the header."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from lightning_sft.types import InputError

_SEPARATORS = (",", ";", "\t", "|")
_QUOTED = re.compile(r'"[^"]*"?')
_SAID = re.compile(r"sep=(.)\s*")  # a first line that is Excel's own


class BrokenRow:
    """A row that cannot be read, among others that can.

    Args:
        error: What is wrong with it, with its place.
    """

    def __init__(self, error: InputError) -> None:
        self.error = error

    def parse(self) -> Any:
        """Nothing.

        Raises:
            InputError: The error.
        """
        raise self.error


def rows_of_csv(
    path: Any, lines: Iterator[bytes], decode: Callable[[bytes, int], str], usual: str, longest: int
) -> Iterator[tuple[Any, int]]:
    """The rows, each with the number of the line on which it begins.

    Args:
        path: File, for messages.
        lines: Lines of the file.
        decode: The text of a line, by its number.
        usual: What stands between cells, unless the header has something else there.
        longest: Most characters of a cell.

    Raises:
        InputError: When the header cannot be read.
    """
    csv.field_size_limit(longest)  # 128 KiB are the default
    left, taken = enumerate(lines, 1), list[tuple[int, bytes]]()
    again: deque[tuple[int, bytes]] = deque()  # lines that a quotation mark had taken into a row that was none

    def texts() -> Iterator[str]:
        while line := again.popleft() if again else next(left, None):
            taken.append(line)
            try:
                yield decode(line[1], line[0])
            except InputError as error:
                raise _LineError(error) from error

    delimiter, header, named = usual, list[str](), 0  # number of the last column with a name
    if first := next(left, None):
        text = decode(first[1], 1)
        said = _SAID.fullmatch(text)
        delimiter = said[1] if said else _separator(text, usual)
        again.extend([] if said else [first])
    reader = csv.reader(texts(), strict=True, delimiter=delimiter)
    while True:
        taken.clear()
        try:
            cells = next(reader, None)
        except (csv.Error, _LineError) as error:
            place = taken[0][0]
            broken = _refusal(path, place, error)
            if not header:
                raise broken from error
            yield BrokenRow(broken), place
            again.extendleft(reversed(taken[1:]))
            reader = csv.reader(texts(), strict=True, delimiter=delimiter)
            continue
        if cells is None:
            return
        place = taken[0][0]
        if not header:
            header = cells
            named = max((number for number, name in enumerate(header, 1) if name.strip()), default=0)
            if len(set(header[:named])) < named:
                raise InputError(f"{path}:{place}: two columns have the same name: {header}.")
        elif len(cells) == len(header):
            spilt = next((number for number, cell in enumerate(cells[named:], named + 1) if cell.strip()), None)
            if spilt is None:  # spreadsheets write empty columns behind the last
                yield dict(zip(header, cells, strict=True)), place
                continue
            what = (
                f"{path}:{place}: column {spilt} has a text and no name. Quote texts with commas, or name the column."
            )
            yield BrokenRow(InputError(what)), place
        elif cells:
            count = f"{path}:{place}: the row has {len(cells)} cells, the header {len(header)}."
            yield BrokenRow(InputError(count)), place


class _LineError(Exception):
    """A line that is no text, and why."""


def _refusal(path: Any, place: int, error: Exception) -> InputError:
    if isinstance(error, _LineError):
        return InputError(str(error))
    return InputError(
        f"{path}:{place}: not valid CSV: {error}. A quotation mark in a cell is written twice, and the cell stands in "
        "quotation marks."
    )


def _separator(header: str, usual: str) -> str:
    r"""What stands between the cells of a header: the usual, unless it has none of that and something else.

    >>> _separator("Frage;Antwort\n", ","), _separator('"a;b",c', ","), _separator("a,b", "\t"), _separator("a", ",")
    (';', ',', ',', ',')
    """
    bare = _QUOTED.sub("", header)
    return next((mark for mark in (usual, *_SEPARATORS) if mark in bare), usual)
