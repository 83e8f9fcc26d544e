"""Strict JSON: no NaN, no duplicate keys, every number in range, bounded nesting depth."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import Any

MAX_DEPTH = 100
"""Maximum nesting depth of lists and objects, since rows are read and rendered recursively."""


def loads(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: When it is not JSON, or ambiguous: a key twice in an object, NaN, Infinity, or nested too deeply.

    >>> loads('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ...
    ValueError: the key 'a' is there twice
    """
    value = _strictly(DECODER.decode, text)
    _check_depth(value, text)
    return value


def raw_decode(text: str, begin: int) -> tuple[Any, int]:
    """The JSON value that begins at a position of a text, and where it ends.

    Raises:
        ValueError: If the text is not strict JSON, as in :func:`loads`.
    """
    value, end = _strictly(DECODER.raw_decode, text, begin)
    _check_depth(value, text[begin:end])
    return value, end


def _strictly(decode: Any, *args: Any) -> Any:
    try:
        return decode(*args)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    except json.JSONDecodeError:
        raise
    except _NotFiniteError as error:
        raise ValueError(f"{error}{_place(decode.__name__, *args)}") from error
    except ValueError as error:
        if "int_max_str_digits" not in str(error):  # Python's advice is for who writes a program
            raise
        raise ValueError("an integer has thousands of digits. Write it as a string, in quotation marks") from error


class _NotFiniteError(ValueError):
    """A number is NaN, infinite, or too large."""


def _place(method: str, *args: Any) -> str:
    """The key that has the number: a row is read again for it, so that usual rows need not be searched."""
    keys: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        keys.extend(key for key, value in pairs if not _is_finite(value))

    getattr(json.JSONDecoder(object_pairs_hook=note), method)(*args)
    return f", in the key {keys[0]!r}" if keys else ""


def _is_finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _check_depth(value: Any, text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:  # of almost all rows
        return
    level, depth = _containers([value]), 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        inside = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = _containers(chain.from_iterable(inside))


def _containers(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, (dict, list))]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {next(key for key, count in counts.items() if count > 1)!r} is there twice")
    return result


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _NotFiniteError(f"the number {text} is too large")
    return value


def _constant(text: str) -> float:
    raise _NotFiniteError(f"{text} is no JSON value")


_TOO_DEEP = f"it is nested too deeply, more than {MAX_DEPTH} lists and objects inside each other"
DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)
