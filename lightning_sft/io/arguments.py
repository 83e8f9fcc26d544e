"""Arguments checked against their annotations, in a call from Python as on the command line.

jsonargparse checks the choices and types of a command line or a YAML file, but not of a call from Python. Here one
function does, for every public constructor: choices are those of ``Literal``, ranges those of
``Annotated[int, Range(ge=1)]``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning_sft.io.closest import ELSEWHERE, of_choices, own_name
from lightning_sft.types import InputError


class Range:
    """The range of an argument, for its annotation; NaN is in no bounded range.

    Args:
        ge: Inclusive lower bound.
        gt: Exclusive lower bound.
        le: Inclusive upper bound.
        lt: Exclusive upper bound.

    >>> Range(ge=0, lt=1), 0.5 in Range(ge=0, lt=1), 1.0 in Range(ge=0, lt=1)
    (>= 0 and < 1, True, False)
    """

    def __init__(
        self, ge: float | None = None, gt: float | None = None, le: float | None = None, lt: float | None = None
    ) -> None:
        self.ge, self.gt, self.le, self.lt = ge, gt, le, lt

    def __contains__(self, value: Any) -> bool:
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __repr__(self) -> str:  # shown by --help
        bounds = {">=": self.ge, ">": self.gt, "<=": self.le, "<": self.lt}
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items() if bound is not None)


class Filled:
    """Said of a string or a list in its annotation: it must not be empty."""

    def __contains__(self, value: Any) -> bool:
        return bool(value)

    def __repr__(self) -> str:  # shown by --help
        return "that is not empty"


class Bytes:
    """Said of a string in its annotation: a number of bytes with its unit.

    >>> "5GB" in Bytes(), "0.5 mb" in Bytes(), "5 parsecs" in Bytes(), "0GB" in Bytes()
    (True, True, False, False)
    """

    def __contains__(self, value: str) -> bool:
        number = re.fullmatch(r"([0-9]*\.?[0-9]+) *[KMGT]B", value.strip().upper())
        return number is not None and float(number[1]) > 0

    def __repr__(self) -> str:
        return "such as 5GB or 200MB"


Count = Annotated[int, Range(ge=1)]
"""An integer of at least 1."""

Index = Annotated[int, Range(ge=0)]
"""An integer of at least 0, as a seed."""

NonNegative = Annotated[float, Range(ge=0)]
"""A number of at least 0."""

Fraction = Annotated[float, Range(ge=0, le=1)]
"""A share from 0 to 1, both included."""

Positive = Annotated[float, Range(gt=0, lt=math.inf)]
"""A finite number greater than 0."""

BelowOne = Annotated[float, Range(ge=0, lt=1)]
"""A share from 0 to 1, without 1."""

AboveZero = Annotated[float, Range(gt=0, le=1)]
"""A share from 0 to 1, without 0."""

Tokens = Annotated[int, Range(ge=2)]
"""A number of tokens of which one can be a target, since the first has no context."""

Name = Annotated[str, Filled()]
"""What something is called."""

FileSize = Annotated[str, Bytes()]
"""A maximum size of files."""

_RULES = (Range, Filled, Bytes)
_T = TypeVar("_T")

_OF_CLASS = re.compile(r"Problem with given class_path '([\w.]+)':\s*(.+?)(?=\n  - |\nGiven value|$)", re.DOTALL)


def plain(value: Any) -> Any:
    """A list or dictionary of OmegaConf as one of Python, a path as its text, also in a list; others as they are.

    A checkpoint holds plain values only, and rows are told by being dictionaries.

    Args:
        value: An argument as it was given.

    >>> plain([1, "a"]), plain(None), plain(Path("a", "b")), plain(["a", Path("b")])
    ([1, 'a'], None, 'a/b', ['a', 'b'])
    """
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (str, Path)):  # no rows
        return type(value)(map(plain, value)) if any(isinstance(one, Path) for one in value) else value
    if type(value).__module__.partition(".")[0] != "omegaconf":
        return value
    from omegaconf import OmegaConf

    return OmegaConf.to_object(value)


def check_arguments(of: Callable[..., Any], given: Mapping[str, Any], prefix: str | None = None) -> None:
    """Refuse arguments that their annotations do not allow.

    Args:
        of: Class whose constructor is called, or function.
        given: Arguments by name: ``locals()``, or ``vars(self)`` of a dataclass. Other names are skipped.
        prefix: Config section of the arguments, as ``model``; by default the name of the class.

    Raises:
        InputError: If a value is not one of the choices, out of range, or of another type.

    >>> check_arguments(Range, {"ge": "one"})
    Traceback (most recent call last):
        ...
    lightning_sft.types.InputError: Range.ge is 'one'; expected a number or null.
    """
    for name, hint in _hints(of).items():
        value = plain(given.get(name))
        if name in given and not _fits(value, hint):
            expected = _either(list(dict.fromkeys(_described(hint))))
            where = f"{of.__name__ if prefix is None else prefix}.{name}"
            raise InputError(f"{where} is {_shown(value)}; expected {expected}.{_remedy(value, hint, name)}")


def made(of: Callable[..., _T], given: Any) -> Any:
    """An object from the mapping of its arguments, as YAML and checkpoints have it; anything else as it is.

    Args:
        of: Class of the object.
        given: Mapping of arguments, object, or ``None``.

    Raises:
        InputError: When it has no such argument.
    """
    given = plain(given)
    if not isinstance(given, Mapping):
        return given
    known = list(_hints(of))
    for name in given:
        if name not in known:
            closest = own_name(str(name), known)
            raise InputError(f"{of.__name__} has no {name!r}; it has {', '.join(known)}.{closest}")
    return of(**given)


@contextmanager
def unwrapped() -> Iterator[None]:
    """A refusal inside that jsonargparse has put among the reasons of a union's other types comes out by itself.

    So does what a class of others says when it is made, as a logger whose package is not installed.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__
        if cause is error:
            raise
        if cause is not None:
            raise cause from None
        if (said := _OF_CLASS.search(str(error))) is None:
            raise
        raise InputError(f"{said[1]}: {' '.join(said[2].split())}") from error


@lru_cache
def _hints(of: Any) -> dict[str, Any]:
    function: Any = vars(of)["__init__"] if isinstance(of, type) else of
    hints = get_type_hints(function, include_extras=True)
    return {name: hint for name, hint in hints.items() if name != "return"}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value matches an annotation; unknown annotations match any value."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, inner[0]) and all(value in one for one in inner[1:] if isinstance(one, _RULES))
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    kind = origin or hint
    if kind is Any or not isinstance(kind, type):
        return True
    if kind in (list, Sequence):
        items = isinstance(value, (list, tuple) if kind is list else Sequence) and not isinstance(value, str)
        return items and all(_fits(item, one) for one in inner for item in value)
    if kind in (dict, Mapping) and isinstance(value, Mapping) and inner:
        of_values = inner[1] if isinstance(inner[1], type) else Any  # a union is checked where it is read
        return all(_fits(one, inner[0]) and _fits(value[one], of_values) for one in value)
    if kind is Iterable:  # of rows, where names are a Sequence[str]
        named = isinstance(value, (list, tuple)) and value and isinstance(value[0], str)
        return isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and not named
    return isinstance(value, kind) or (is_dataclass(kind) and isinstance(value, Mapping))


_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path",
    NoneType: "null",
    dict: "a dictionary",
    Iterable: "rows",
    Callable: "a function",
}


def _described(hint: Any) -> Iterator[str]:
    """In words, each thing that an annotation allows."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from (f"{words} {' '.join(map(repr, inner[1:]))}" for words in _described(inner[0]))
    elif origin in (Union, UnionType):
        for one in inner:
            yield from _described(one)
    elif origin is Literal:
        yield from map(str, inner)
    elif origin in (list, Sequence):
        yield f"a list of {_of_kind(inner)}"
    elif origin in (dict, Mapping):
        yield f"a dictionary of {_of_kind(inner[1:])}"
    else:
        kind = origin or hint
        yield _WORDS.get(kind) or f"{getattr(kind, '__name__', kind)}"


def _of_kind(inner: tuple[Any, ...]) -> str:
    return "strings" if inner == (str,) else "values"


def _either(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _shown(value: Any) -> str:
    if not isinstance(value, (str, int, float, Path, list, tuple, dict, NoneType)):
        return f"an object of type {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _remedy(value: Any, hint: Any, name: str) -> str:
    if hasattr(value, "peft_type"):
        return _of_peft(value, hint)
    if hasattr(value, "save_pretrained"):
        return " Write it to a folder with its save_pretrained, and give that folder."
    for kind in _dataclasses(hint):
        setting = fields(kind)[0].name
        first = value if _fits(value, _hints(kind)[setting]) else fields(kind)[0].default
        if first is not MISSING:  # of all settings that are optional
            made_of = f"from {kind.__module__} import {kind.__name__}"
            return f" Give {kind.__name__}({setting}={first!r}) ({made_of}), or {{{setting!r}: {first!r}}}."
    if _makes(hint) == "Optimizer":  # it is made when the weights have been loaded
        return " The weights are loaded later: give a class, or functools.partial(torch.optim.AdamW, lr=2e-5)."
    bounds = [one for one in get_args(hint)[1:] if isinstance(one, Range)]
    if isinstance(value, Real) and float(value) > 1 and any(1 in (one.le, one.lt) for one in bounds):
        if name == "warmup":
            return f" It is a share of the optimizer steps: for {value:g} of 2,000 steps, give {value:g} / 2000."
        return f" It is a share: {value:g} % are {float(value) / 100:g}."
    return of_choices(value, _choices(hint), 0.5) if isinstance(value, str) else ""


def _of_peft(config: Any, hint: Any) -> str:
    """The settings of a configuration of peft as those of ours, with what differs from peft's defaults."""
    kind = next(_dataclasses(hint), None)
    if kind is None:
        return ""
    hints, defaults = _hints(kind), {own.name: own.default for own in fields(config)}
    found: dict[str, Any] = {}
    for theirs, value in vars(config).items():
        ours = theirs if theirs in hints else ELSEWHERE.get(theirs, "").rpartition(".")[2]
        own = sorted(value) if isinstance(value, set) else value
        is_set = theirs in ("r", "lora_alpha") or value != defaults.get(theirs)
        if is_set and ours in hints and _fits(own, hints[ours]):
            found[ours] = [*found.get(ours, ()), *own] if isinstance(own, list) else own
    settings = ", ".join(f"{name}={value!r}" for name, value in found.items())
    return (
        f" Give {kind.__name__}({settings}) (from {kind.__module__} import {kind.__name__}). Settings of peft that it "
        "does not have are not supported."
    )


def _makes(hint: Any) -> str | None:
    """Name of what a function makes, where an annotation asks for one."""
    if get_origin(hint) is Callable:
        return getattr(get_args(hint)[-1], "__name__", None)
    return next(filter(None, map(_makes, get_args(hint))), None)


def _dataclasses(hint: Any) -> Iterator[Any]:
    """Classes of settings among those that an annotation allows, not in a list."""
    if is_dataclass(hint):
        yield hint
    for one in get_args(hint) if get_origin(hint) in (Union, UnionType) else ():
        yield from _dataclasses(one)


def _choices(hint: Any) -> Iterator[str]:
    if get_origin(hint) is Literal:
        yield from (choice for choice in get_args(hint) if isinstance(choice, str))
        return
    for one in get_args(hint):
        yield from _choices(one)
