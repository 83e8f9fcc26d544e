"""What jsonargparse says of a wrong argument, in plain words: what was given, and what is expected."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple, get_args, get_origin

from lightning_sft.io.closest import meant, of_choices, own_name

_KEY = re.compile(r'Parser key "([^"]+)": ')
_NO_FILE = re.compile(r"""Parser key "config": File does not exist: '(.*?)'.?""")
_NOT_ACCEPTED = re.compile(r"(?:Subcommand '[^']+'|Group '([^']+)') does not accept option '([^']+)'\.?")
_UNKNOWN = re.compile(r"Option '([^']+)' is not accepted")
_NO_VALUE = re.compile(r"argument (?:-\w/)?--([\w.]+)\S*: expected (?:one|at least one) argument")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)|has no attribute '(\w+)'|No module named '([\w.]+)'")
_GIVEN = re.compile(
    r"(?:Got value|Given value): (.*?)(?= - Expected a |\. Got value: | Given value type: | - (?:Not|Problem) |$)"
)
_WHOLE = "Given value: "  # the last one is that of the outermost argument
_PERCENT = re.compile(r"([\d.]+) *%")
_PATH = re.compile(r"(?:class_path=|a path but |string: )'?([\w.]+)")
_CLASS = re.compile(r"class_path[=']*:? ?'([\w.]+)'")
_WORDS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a string", "NoneType": "null"}
_WORDS |= {"list": "a list", "dict": "a dictionary", "pathlib.Path": "a path"}


class Refusal(NamedTuple):
    """What is wrong with an argument.

    Args:
        key: Name of the argument, as ``model.optimizer.lr``.
        said: What follows the name.
        value: Text of the value; ``None`` where the name itself is wrong.
    """

    key: str
    said: str
    value: str | None = None


def refusal(message: str, hints: Any, args: Sequence[str]) -> Refusal | None:
    """A message of jsonargparse as a refusal; ``None`` where its words are plain, or not known.

    Args:
        message: The message, in one line.
        hints: Annotations of the arguments by name.
        args: The command line.
    """
    if missing := _NO_VALUE.fullmatch(message):
        return _without_value(missing[1], args)
    if absent := _NO_FILE.fullmatch(message):
        return Refusal("config", f"is {absent[1]}; there is no such file.")
    if refused := _NOT_ACCEPTED.fullmatch(message):
        key = refused[2] if refused[1] is None else f"{refused[1]}.{refused[2]}"
        return Refusal(key, f"is not known.{meant([key], hints)}")
    keys = list(dict.fromkeys(_KEY.findall(message)))
    if not keys:
        return None
    key, inner = keys[0], _KEY.split(message)[-1]
    if len(keys) > 1 and (nested := _nested(message, keys, inner)) is not None:
        return nested
    if (unknown := _UNKNOWN.search(message)) and len(keys) == 1:
        return _unknown(key, unknown[1], _CLASS.findall(message[: unknown.start()]) or _CLASS.findall(message))
    given = _GIVEN.search(inner)
    expected = list(dict.fromkeys(_expected(inner if given is None else inner[: given.start()])))
    settings = [kind for kind in _classes(hints.get(key)) if is_dataclass(kind)]
    if settings and len(keys) == 1 and given is not None:
        example = f"{key}.{fields(settings[0])[0].name}"
        return Refusal(key, f"is {given[1].rstrip('.')}; expected its settings, as {example}, or null.", given[1])
    if (no_class := _NO_CLASS.search(inner)) and (len(keys) == 1 or not set(expected) - {"null"}):
        name = next(filter(None, no_class.groups()))
        path = next((path for path in _PATH.findall(inner) if name in path.split(".")), name)
        found = _misspelt(".".join(keys[:2]), path, expected, hints.get(".".join(keys[:2])))
        package = f" No package {no_class[3].partition('.')[0]} is installed." if no_class[3] else ""
        return found._replace(said=f"{found.said}{package}")
    if given is None or not expected:
        return None
    value = given[1].rstrip(".")
    said = f"is {value}; expected {_either(expected)}.{of_choices(value, expected, 0.5)}"
    return Refusal(".".join(keys[:2]), said, value)


def _nested(message: str, keys: Sequence[str], inner: str) -> Refusal | None:
    """What is wrong within a mapping of names to settings, as the parts of a mixture are, with the name."""
    given = _GIVEN.search(inner)
    try:
        value = ast.literal_eval(message.rpartition(_WHOLE)[2])
    except (ValueError, SyntaxError):
        return None
    unknown = _UNKNOWN.search(inner)
    text = given[1].rstrip(".") if given else None
    leaf = unknown[1] if unknown else keys[-1] if len(keys) > 2 else None
    path = next(_paths(value, leaf, None if unknown else text), "")
    if path.count(".") < 1 or not path.startswith(f"{keys[1]}."):
        return None
    key = f"{keys[0]}.{path}"
    if unknown:
        return _unknown(key.rpartition(".")[0], unknown[1], _CLASS.findall(message[: message.rfind(unknown[0])]))
    expected = list(dict.fromkeys(_expected(inner[: given.start()] if given else inner)))
    percent = _PERCENT.fullmatch(text or "") if "a number" in expected else None
    hint = f" Write {float(percent[1]) / 100:g}." if percent else ""
    return Refusal(key, f"is {text}; expected {_either(expected)}.{hint}", text) if expected else None


def _paths(value: Any, leaf: str | None, text: str | None, before: str = "") -> Iterator[str]:
    """Dotted names in a mapping whose last one, or whose value as a text, is known."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        if leaf in (None, name) and text in (None, str(inner)):
            yield f"{before}{name}"
        yield from _paths(inner, leaf, text, f"{before}{name}.")


def _without_value(key: str, args: Sequence[str]) -> Refusal | None:
    """What argparse calls by the name of a section, and what it takes for the next option."""
    for name, following in zip(args, [*args[1:], ""], strict=True):
        option = name.removeprefix("--")
        if (
            name.startswith("--")
            and f"{option}.".startswith(f"{key}.")
            and (following.startswith("-") or not following)
        ):
            is_option = following.startswith("--") or not following
            hint = "" if is_option else f" If {following} is the value, write --{option}={following}."
            return Refusal(option, f"has no value.{hint}")
    return None


def _unknown(key: str, name: str, classes: Sequence[str]) -> Refusal:
    """An argument that a class does not have."""
    module, _, kind = (classes or [""])[-1].rpartition(".")
    try:
        known = [own for own in signature(getattr(import_module(module), kind)).parameters if own != "params"]
    except (ImportError, AttributeError, ValueError, TypeError):
        return Refusal(f"{key}.{name}", "is not known.")
    return Refusal(f"{key}.{name}", f"is not known: {kind} has {', '.join(known)}.{own_name(name, known)}")


def _misspelt(key: str, name: str, choices: list[str], hint: Any) -> Refusal:
    """A name that is none of the choices and of no class."""
    bases = [base for base in dict.fromkeys(_classes(hint)) if base.__subclasses__()]
    known = {kind.__name__ for base in bases for kind in _below(base)}
    of = f" of {_either([base.__name__ for base in bases])}" if bases else ""
    words = [choice for choice in choices if choice not in _WORDS.values()]
    expected = _either([*words, f"the path of a class{of}, as package.module.Name"])
    closest = of_choices(name.rpartition(".")[2], [*words, *sorted(known)], 0.7)
    return Refusal(key, f"is {name}; expected {expected}.{closest}", name)


def _expected(text: str) -> Iterator[str]:
    """The types that a message names, in words; choices one by one."""
    found = re.search(r"Subtypes: \[(.*?)\] Errors: ", text)
    for literal, kind in re.findall(
        r"Literal\[(.*?)\]|<class '([\w.]+)'>", found[1] if found else text.split(" Given ")[0]
    ):
        if literal:
            yield from map(str, ast.literal_eval(f"[{literal}]"))
        elif kind in _WORDS:
            yield _WORDS[kind]


def _classes(hint: Any) -> Iterator[type[Any]]:
    """Classes in an annotation that are not Python's own."""
    if isinstance(hint, type) and hint.__module__ != "builtins":
        yield hint
    inner = get_args(hint)
    for one in inner[-1:] if get_origin(hint) is Callable else inner:  # of a function, what it makes
        yield from _classes(one)


def _below(base: type[Any]) -> Iterator[type[Any]]:
    own: list[type[Any]] = base.__subclasses__()
    for kind in own:
        yield kind
        yield from _below(kind)


def _either(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
