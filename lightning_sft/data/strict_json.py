"""JSON that means one thing only: no NaN, no key twice, no number that does not fit."""

from __future__ import annotations

import json
import math
from typing import Any


def loads(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: When it is not JSON, or ambiguous: a key twice in an object, NaN, Infinity, or nested too deeply.

    >>> loads('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ...
    ValueError: the key 'a' is there twice
    """
    return _strictly(DECODER.decode, text)


def raw_decode(text: str, begin: int) -> tuple[Any, int]:
    """The JSON value that begins at a position of a text, and where it ends.

    Raises:
        ValueError: As :func:`loads`.
    """
    value, end = _strictly(DECODER.raw_decode, text, begin)
    return value, end


def _strictly(decode: Any, *args: Any) -> Any:
    try:
        return decode(*args)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return result


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text} is too large")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON value")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)
