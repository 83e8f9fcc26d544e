"""Values of rows, checked: texts, weights and JSON."""

from __future__ import annotations

import math
import reprlib
import warnings
from ast import literal_eval
from contextlib import suppress
from typing import Any

from lightning_sft.data.rows import strict_json
from lightning_sft.types import InputError

_DEEPEST, _LONGEST = 64, 4096  # levels of JSON, bits of an integer: Python does not write much longer ones
_LONGEST_LITERAL = 1 << 16  # characters of a literal of Python that is parsed
_SMALLEST, _LARGEST = 1e-30, 1e9  # of a weight
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


def shown(value: Any) -> str:
    """A value with its type, cut short."""
    if value is None:
        return "null"
    try:
        return f"{type(value).__name__} {_repr.repr(value)}"
    except ValueError:  # an integer of thousands of digits
        return type(value).__name__


def text_of(value: Any, what: str) -> str:
    """The value, if it is a text.

    Raises:
        InputError: When it is none.
    """
    if not isinstance(value, str):
        raise InputError(f"{what} must be a string, got {shown(value)}.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{what} has half a character at {error.start}: {shown(value[error.start])}.") from error
    return value


def weight_of(value: Any, what: str) -> float:
    """The value, if it is a weight; CSV has it as text.

    Raises:
        InputError: When it is no finite number of at least 0.
    """
    try:
        weight = math.nan if isinstance(value, bool) or not isinstance(value, (int, float, str)) else float(value)
    except (ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise InputError(f"{what} must be a finite number that is not negative, got {shown(value)}.")
    return weight


def check_weight(weight: float, what: str) -> None:
    """Check a product of weights: sums of it, and squares of its gradients, have to be numbers of float32.

    Raises:
        InputError: When it is too large or too small for that.
    """
    if weight and not _SMALLEST <= weight <= _LARGEST:
        raise InputError(f"{what} is {weight:g}: a weight must be 0, or a number from {_SMALLEST:g} to {_LARGEST:g}.")


def flag_of(value: Any) -> bool | None:
    """The value, if it is true or false, as CSV has it too; ``None`` where it is something else.

    >>> flag_of(True), flag_of("False"), flag_of(1), flag_of("yes")
    (True, False, None, None)
    """
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    return value if isinstance(value, bool) else None


def decoded(value: Any, what: str) -> Any:
    """The value of a JSON text, also of one that was encoded twice; anything else as it is.

    Raises:
        InputError: When a text is no JSON.
    """
    for _ in range(3):
        if isinstance(value, str):
            try:
                value = strict_json.loads(value)
            except ValueError as error:
                raise InputError(f"{what}: not valid JSON: {error}; got {shown(value)}.") from error
    return value


def decoded_call(value: Any, what: str) -> Any:
    """The value of a tool call in JSON, or else of a literal of Python: Glaive's arguments are in single quotes.

    Raises:
        InputError: When a text is neither.

    >>> decoded_call("{'name': 'weather', 'arguments': {}}", "a call")
    {'name': 'weather', 'arguments': {}}
    """
    try:
        return decoded(value, what)
    except InputError:
        if len(value) > _LONGEST_LITERAL:
            raise
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes
            return literal_eval(value)
        raise


def check_json(value: Any, what: str, depth: int = 0) -> None:
    """Check that a value is one that JSON has, so that a template can write it.

    Raises:
        InputError: When it is none.
    """
    if depth > _DEEPEST:
        raise InputError(f"{what}: nested more than {_DEEPEST} deep.")
    if isinstance(value, dict):
        for key, inner in value.items():
            text_of(key, f"a key in {what}")
            check_json(inner, what, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            check_json(inner, what, depth + 1)
    elif isinstance(value, str):
        text_of(value, f"a text in {what}")
    elif isinstance(value, int):
        if value.bit_length() > _LONGEST:
            raise InputError(f"{what}: an integer of {value.bit_length():,} bits is too long.")
    elif value is not None and not (isinstance(value, float) and math.isfinite(value)):
        raise InputError(f"{what}: JSON has no value such as {shown(value)}.")
