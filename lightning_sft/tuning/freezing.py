"""Which parameters of a model are trained, by patterns of their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from transformers import PreTrainedModel

from lightning_sft.tuning.quantized import is_packed
from lightning_sft.types import InputError


def choose(model: PreTrainedModel, frozen: Sequence[str], trained: Sequence[str]) -> None:
    """Freeze by pattern, then unfreeze by pattern.

    Args:
        model: With adapters, or without.
        frozen: Patterns of parameters' names, as they are in the pretrained model.
        trained: The same; what both have is trained.

    Raises:
        InputError: When a pattern has no effect, or nothing is left to train.
    """
    parameters = {_plain(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    for setting, patterns, trains in (("frozen", frozen, False), ("trained", trained, True)):
        for pattern in patterns:
            found = [name for name in parameters if fnmatchcase(name, pattern)]
            if not found:
                raise InputError(
                    f"model.{setting} has {pattern!r}, which is the name of no parameter. They are called as "
                    f"{next(iter(parameters))!r}; * stands for anything."
                )
            if trains and (packed := [name for name in found if is_packed(parameters[name])]):
                raise InputError(f"model.trained has {pattern!r}, but {packed[0]} is quantised and cannot be trained.")
            if all(parameters[name].requires_grad is trains for name in found):
                raise InputError(
                    f"model.{setting} has {pattern!r}, but {found[0]} and all others like it are {setting} already. "
                    "Leave it out; to train nothing else, set model.frozen=['*'] and model.trained."
                )
            for name in found:
                parameters[name].requires_grad_(trains)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise InputError(
            f"model.frozen={list(frozen)} leaves nothing to train. Freeze less, or say with model.trained "
            "what is trained all the same."
        )


def _plain(name: str) -> str:
    """The name that a parameter has in the pretrained model."""
    return re.sub(r"\.(base_layer\.)+", ".", name)
