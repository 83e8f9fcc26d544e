"""Arguments and overrides by other names than ours, of classes that users make or derive from in Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from types import FunctionType
from typing import Any, Self, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sft.io.closest import ELSEWHERE, did_you_mean
from lightning_sft.types import InputError

_OWNERS = {"model": "SFTModule", "data": "SFTDataModule", "trainer": "Trainer"}  # of the sections of a config
_LIKE = 0.88  # similarity above which the name of a method is taken for a misspelt one of ours
_LIKE_ARGUMENT = 0.8
_LOSSES = ("compute_loss", "compute_loss_func", "training_loss", "loss", "loss_fn", "loss_func", "loss_function")
_LOSS: tuple[str, ...] = ("target_loss", "forward", "training_step")  # what a subclass overrides for another loss
_DATACLASSES: list[type[Any]] = []
T = TypeVar("T")


class OurNames:
    """Base of classes that refuse arguments, and warn of overrides, that are called otherwise here."""

    def __new__(cls, *args: Any, **given: Any) -> Self:
        """Look at the names alone: not in ``__init__``, whose signature editors and jsonargparse read."""
        check_names(cls, given)
        base = next(kind for kind in cls.__mro__ if OurNames in kind.__bases__)
        for name, ours in _misspelt_overrides(cls, base):
            rank_zero_warn(
                f"{cls.__name__}.{name} overrides nothing: {base.__name__} has no method of this name, and calls none. "
                f"Did you mean {ours}?"
            )
        return super().__new__(cls)


def our_names(cls: type[T]) -> type[T]:
    """Make a dataclass refuse arguments called otherwise here: with a plain base, jsonargparse sees no dataclass."""
    init = vars(cls)["__init__"]

    @wraps(init)
    def named(self: T, *args: Any, **given: Any) -> None:
        check_names(cls, given)
        init(self, *args, **given)

    _DATACLASSES.append(cls)
    setattr(cls, "__init__", named)  # noqa: B010  # mypy lets no method be assigned
    return cls


def check_names(cls: type[Any], given: Iterable[str]) -> None:
    """Refuse names that the constructor of a class does not have.

    Args:
        cls: The class.
        given: Names of arguments.

    Raises:
        InputError: With the first of them, and what may be meant.
    """
    known = signature(cls.__init__).parameters
    unknown = [name for name in given if name not in known]
    if unknown and not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in known.values()):
        raise InputError(f"{cls.__name__} has no argument {unknown[0]!r}.{_meant(cls, unknown[0])}")


def _meant(cls: type[Any], name: str) -> str:
    """A sentence about the argument that stands for a name: of the module, the data module or the trainer, else a like
    one of the class itself, else one of any class of ours.
    """
    section, _, key = ELSEWHERE.get(name, "").partition(".")
    part, _, setting = key.partition(".")
    if part == "optimizer" and setting:
        make = f"functools.partial(torch.optim.AdamW, {setting}=...)"
        return f" It is one of the optimizer's: SFTModule(optimizer={make})."
    if part == "lora" and setting:
        own = setting if cls.__name__ == "Lora" else f"SFTModule(lora=Lora({setting}=...))"
        return f" Did you mean {own}?"
    owner, known = _OWNERS.get(section), _arguments(cls)
    if owner is None:
        ours = {kind.__name__: _arguments(kind) for kind in (*OurNames.__subclasses__(), *_DATACLASSES, Trainer)}
        candidates = [
            *((name, kind) for kind in _OWNERS.values() if name in ours[kind]),
            *((near, cls.__name__) for near in get_close_matches(name, known, n=1, cutoff=_LIKE_ARGUMENT)),
            *((name, kind) for kind in ours if name in ours[kind]),
        ]
        key, owner = candidates[0] if candidates else (name, None)
    if owner is None:
        return did_you_mean([name], known) or f" It has {', '.join(known) or 'none'}."
    return f" Did you mean {key}?" if owner == cls.__name__ else f" Did you mean {owner}({key}=...)?"


def _arguments(cls: type[Any]) -> list[str]:
    return [name for name in signature(cls).parameters if name not in ("args", "kwargs")]


def _misspelt_overrides(cls: type[Any], base: type[Any]) -> Iterator[tuple[str, str]]:
    """Methods that a class adds to its base and are named almost as one of it, with the one that may be meant.

    A method beside an override of that one is taken for a helper of it.
    """
    derived = cls.__mro__[: cls.__mro__.index(base)]
    own = {name for kind in derived for name, value in vars(kind).items() if isinstance(value, FunctionType)}
    for name in sorted(name for name in own.difference(dir(base)) if name[0] != "_"):
        ours, instead = _LOSS[0], _LOSS
        if name not in _LOSSES or not hasattr(base, ours):
            hooks = [hook for hook in dir(base) if "_" in hook and hook[0] != "_" and callable(getattr(base, hook))]
            ours = next(iter(get_close_matches(name, hooks, n=1, cutoff=_LIKE)), "")
            instead = (ours,)
        if ours and own.isdisjoint(instead):
            yield name, ours
