"""Hooks of Lightning in which a module does a part of its work: a subclass that overrides one has to call it too."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from lightning_sft.types import InputError

_OTHERS = ("setup", "configure_callbacks", "configure_model")  # hooks beside those whose names begin with on_


def check_hooks(kind: type) -> None:
    """Refuse a class that overrides a hook of ours without calling it, as steps or resumes would silently differ.

    Args:
        kind: Class of a module, ours or derived from it.

    Raises:
        InputError: With the hook.
    """
    for name in dir(kind):
        if not (name.startswith("on_") or name in _OTHERS):
            continue
        defined = [base for base in kind.__mro__ if name in vars(base)]
        number = next((n for n, base in enumerate(defined) if _is_ours(base)), 0)
        for base in defined[:number]:
            code = getattr(inspect.unwrap(vars(base)[name]), "__code__", None)
            if code is not None and not {"super", name} & set(_names(code)):
                raise InputError(
                    f"{base.__name__}.{name} overrides a hook in which {defined[number].__name__} does a part of its "
                    f"work. Call super().{name}({_arguments(vars(base)[name])}) in it."
                )


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "lightning_sft"


def _names(code: CodeType) -> Iterator[str]:
    """Names that a function refers to, and functions in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _arguments(hook: Any) -> str:
    kinds = inspect.Parameter
    stars: dict[Any, str] = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}
    own = list(inspect.signature(hook).parameters.values())[1:]
    return ", ".join(f"{stars.get(parameter.kind, '')}{parameter.name}" for parameter in own)
