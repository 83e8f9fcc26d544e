"""What a checkpoint may hold: tensors and plain values, which are read again without running code."""

from __future__ import annotations

import io
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import PurePath
from types import FunctionType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sft.types import InputError

_PLAIN = {str, int, float, bool, NoneType}
_HOLDERS = {
    "callbacks": "the state of the callback",
    "hyper_parameters": "the hyperparameters of the module:",
    "datamodule_hyper_parameters": "the hyperparameters of the data module:",
    "optimizer_states": "the state of the optimizer",
    "lr_schedulers": "the state of the scheduler",
    "state_dict": "the state_dict of the module:",
}


def refuse_objects(checkpoint: Mapping[str, Any]) -> None:
    """Refuse to save what no run could resume from, since reading it again could run code.

    Args:
        checkpoint: The checkpoint, or the part of it that is known already.

    Raises:
        InputError: With what holds the object, and what to keep instead.
    """
    if (reason := why_not_resumable(checkpoint)) is not None:
        raise InputError(reason)


def why_not_resumable(checkpoint: Mapping[str, Any]) -> str | None:
    """What :func:`refuse_objects` says of a checkpoint; ``None`` where there is nothing to say.

    Args:
        checkpoint: The checkpoint, or the part of it that is known already.

    >>> why_not_resumable({"callbacks": {"Window": {"losses": [1.0, torch.ones(2)]}}})
    """
    if (found := next(_objects(checkpoint, ()), None)) is None:
        return None
    where, value = found
    return (
        f"No run could resume from this checkpoint: {_holder(where)} has {_described(value)}, and reading it again "
        "could run code. A state may have numbers, texts, None, lists, tuples, dicts and tensors. "
        f"{_instead(value)}"
    )


def _objects(value: Any, where: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The values that torch does not load without running code, and the keys that lead to each."""
    kind = type(value)
    if kind in _PLAIN or isinstance(value, Tensor):
        return
    if kind in (dict, OrderedDict):
        for key, own in value.items():
            if type(key) not in _PLAIN:
                yield from _objects(key, (*where, "a key"))
            yield from _objects(own, (*where, str(key)))
    elif kind in (list, tuple):
        if not set(map(type, value)) <= _PLAIN:  # most lists are of numbers, and may be long
            for number, own in enumerate(value):
                yield from _objects(own, (*where, str(number)))
    elif not _is_loaded(value):
        yield where, value


def _is_loaded(value: Any) -> bool:
    """Whether torch saves a value, and loads it without running code."""
    file = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(value, file)
            file.seek(0)
            torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError, ValueError, LookupError):
        return False  # these are what pickle, torch and a __reduce__ of the user's own raise for what cannot be saved
    return True


def _holder(where: tuple[str, ...]) -> str:
    first, *keys = where or ("the checkpoint",)
    if first in ("hyper_parameters", "datamodule_hyper_parameters", "state_dict"):
        return f"{_HOLDERS[first]} {'.'.join(keys)}"
    if first in _HOLDERS and keys:
        owner, *keys = keys
        inside = f" at {''.join(f'[{key!r}]' for key in keys)}" if keys else ""
        return f"{_HOLDERS[first]} {owner}{inside}"
    return f"checkpoint{''.join(f'[{key!r}]' for key in where)}"


def _described(value: Any) -> str:
    kind = type(value)
    if isinstance(value, FunctionType):
        return f"the function {value.__qualname__}"
    return f"an object of the class {kind.__module__}.{kind.__qualname__}".replace("builtins.", "")


def _instead(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return "Keep it as x.tolist(), or torch.from_numpy(x)."
    if isinstance(value, np.generic):
        return "Keep it as float(x), or x.item()."
    if isinstance(value, Mapping):
        return "Keep it as dict(x)."
    if isinstance(value, PurePath):
        return "Keep it as str(x)."
    if isinstance(value, Enum):
        return "Keep it as x.value."
    if isinstance(value, FunctionType):
        return "Leave it out, and set it again when the state is loaded."
    if hasattr(value, "__iter__"):
        return "Keep it as list(x)."
    return "Keep the numbers that it is made of, and make it again from them when the state is loaded."
