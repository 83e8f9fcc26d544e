"""YAML files of the command line: refused where no parser gets through them, and the lines where their keys stand."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from lightning_sft.types import InputError

MAX_VALUES = 100_000
"""Values of a config file, where an alias counts as often as it stands for something."""

_KEY = re.compile(r"(?:model|data|trainer)(?:\.\w+)+")  # at the beginning of a refusal


def flags(args: Sequence[str]) -> list[tuple[str, str]]:
    """The options of a command line, each with its value: what stands behind ``=``, or else the next argument."""
    following = [*args[1:], ""]
    pairs = zip(args, following, strict=True)
    return [(a.partition("=")[0], a.partition("=")[2] if "=" in a else b) for a, b in pairs if a.startswith("-")]


def is_config(value: str) -> bool:
    """Whether a value of a command line is a YAML file."""
    return value.endswith((".yaml", ".yml")) and Path(value).is_file()


def check_config(path: str, is_whole: bool = False) -> None:
    """Refuse a file that is no YAML or has a key twice, of which the first would be lost.

    Aliases that stand for themselves or for too much are refused, too: what reads them would not end.

    Args:
        path: The file.
        is_whole: Whether it has the sections of a configuration, rather than the value of one option.

    Raises:
        InputError: When it is such a file, with the line.
    """
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        size = 0 if root is None else _size(root, {})
    except RecursionError as error:
        raise InputError(f"{path}: an alias stands for what it is in, or it is nested too deeply.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text in UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"{error.problem_mark.line + 1}:"
        what = ", ".join(filter(None, (error.context, error.problem)))
        blanks = " YAML is indented with blanks, not with tabs." if r"'\t'" in what else ""
        raise InputError(f"{path}:{line} not valid YAML: {what}.{blanks}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {error}.") from error
    if size > MAX_VALUES:
        raise InputError(f"{path}: its aliases stand for {size:,} values; at most {MAX_VALUES:,} are read.")
    if is_whole and not isinstance(root, yaml.MappingNode):
        begin = 1 if root is None else _line(root)
        raise InputError(f"{path}:{begin}: expected sections with their keys, as model:, data: and trainer:.")
    if root is not None and (twice := next(_twice(root), None)) is not None:
        first, second = twice
        raise InputError(
            f"{path}:{_line(second)}: the key {second.value!r} is there already, in line {_line(first)}, and only one "
            "of the two would count. Join them."
        )


def place_of(args: Sequence[str], key: str, value: str | None = None) -> str | None:
    """The file and line of a key in the YAML files of a command line; ``None`` where an option has it, or nothing.

    Args:
        args: The command line.
        key: Dotted name, as ``model.optimizer.lr``.
        value: Text of its value: where that is known, the place that has it is taken.
    """
    found = None
    for flag, text in flags(args):
        option = "" if flag in ("--config", "-c") else flag.lstrip("-").rstrip("+")
        if is_config(text) and f"{key}.".startswith(f"{option}." if option else ""):
            root = yaml.compose(Path(text).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
            pair = _at(root, key.removeprefix(option).strip(".").split("."))
            scalars = [] if pair is None else [one for one in _scalars(pair[1]) if one.value == value]
            if scalars:
                return f"{text}:{_line(scalars[0])}"
            found = found if pair is None else f"{text}:{_line(pair[0])}"
        elif option == key or option.startswith(f"{key}."):
            if text == value:
                return None
            found = None if option == key else found
    return found


@contextmanager
def placed(args: Any) -> Iterator[None]:
    """A refusal inside that begins with a key names the file and line where a YAML file has it.

    Args:
        args: The command line, if it is one.
    """
    try:
        yield
    except InputError as error:
        key = _KEY.match(str(error))
        where = place_of(args, key.group()) if key and isinstance(args, list) else None
        if where is not None:
            error.args = (f"{where}: {error}",)
        raise


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _at(node: yaml.Node | None, parts: Sequence[str]) -> tuple[yaml.Node, yaml.Node] | None:
    """The key and the value at a dotted name; ``init_args`` may stand between its parts, and items of lists."""
    if isinstance(node, yaml.SequenceNode):
        return next(filter(None, (_at(item, parts) for item in node.value)), None)
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value == parts[0]:
            return _at(value, parts[1:]) if parts[1:] else (key, value)
        if key.value == "init_args" and (inner := _at(value, parts)) is not None:
            return inner
    return None


def _scalars(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    for child in _children(node):
        yield from _scalars(child)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return list(chain(*node.value))
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _twice(node: yaml.Node) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Pairs of equal keys of one mapping, anywhere in a node."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[Any, yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    yield seen[key.value], key
                seen[key.value] = key
    for child in _children(node):
        yield from _twice(child)


def _size(node: Any, known: dict[int, int]) -> int:
    """How many values a node of YAML stands for."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        inner = chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_size(child, known) for child in inner)
    return known[id(node)]
