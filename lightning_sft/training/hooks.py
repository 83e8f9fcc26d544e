"""Hooks of Lightning in which a module does a part of its work: a subclass that overrides one has to call it too."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from types import CodeType
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

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
        number = next((n for n, base in enumerate(defined) if is_ours(base)), 0)
        for base in defined[:number]:
            code = getattr(inspect.unwrap(vars(base)[name]), "__code__", None)
            if code is not None and not {"super", name} & set(_names(code)):
                raise InputError(
                    f"{base.__name__}.{name} overrides a hook in which {defined[number].__name__} does a part of its "
                    f"work. Call super().{name}({_arguments(vars(base)[name])}) in it."
                )


def warn_of_unused_settings(module: Any) -> None:
    """Warn of an optimizer or a schedule that is given to a class which makes its own.

    Args:
        module: Module whose class may override ``configure_optimizers``.
    """
    name = "configure_optimizers"
    kind = type(module)
    defined = [base for base in kind.__mro__ if name in vars(base)]
    number = next(n for n, base in enumerate(defined) if is_ours(base))
    used = {used for base in defined[:number] for used in _names(vars(base)[name].__code__)}
    if not number or {"super", name} <= used:
        return
    defaults = {key: one.default for key, one in inspect.signature(defined[number]).parameters.items()}
    given = {
        "optimizers": not callable(module.optimizer),
        "optimizer": callable(module.optimizer) and not _make_the_same(module.optimizer, defaults["optimizer"]),
        "schedule": module.schedule != defaults["schedule"],
        "warmup": module.warmup != defaults["warmup"],
    }
    of_making = {"optimizer", "optimizers"} if used & {"make_optimizer", "optimizer"} else set()
    unused = [key for key, is_given in given.items() if is_given and key not in used | of_making]
    if unused:
        rank_zero_warn(
            f"{_listed([f'model.{key}' for key in unused])} {'has' if len(unused) == 1 else 'have'} no effect: "
            f"{defined[0].__name__}.{name} makes an optimizer of its own. Use self.make_optimizer() in it, call "
            f"super().{name}(), or leave out what is unused."
        )


def _make_the_same(make: Any, default: Any) -> bool:
    """Whether a function of the command line makes what the default one does; others are known by themselves."""
    if make is default:
        return True
    if not isinstance(make, partial) or make.args == ():  # jsonargparse hands the class on as an argument
        return False
    one, other = (made([nn.Parameter(torch.zeros(1, 1))]) for made in (make, default))
    return type(one) is type(other) and one.defaults == other.defaults


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def is_ours(kind: Any) -> bool:
    """Whether a class or a function is of this package, as opposed to a user's."""
    return str(kind.__module__).partition(".")[0] == "lightning_sft"


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
