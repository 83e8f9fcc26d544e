"""Choice of the trained parameters by patterns of their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from lightning_sft.model.pretrained import outside_language_model
from lightning_sft.model.tuning.quantization import is_packed
from lightning_sft.types import InputError


def choose(model: PreTrainedModel, frozen: Sequence[str], trained: Sequence[str]) -> list[str]:
    """Freeze parameters that text does not use and those matching ``frozen``; then unfreeze those matching ``trained``.

    Args:
        model: Model with or without adapters.
        frozen: Patterns of parameter names, as in the pretrained model, to freeze.
        trained: Patterns of parameter names to train; they take precedence over ``frozen``.

    Returns:
        Names of parameters that are frozen without being listed: those that the architecture freezes, and those that
        text does not use.

    Raises:
        InputError: When a pattern has no effect, matches quantized weights to train, or nothing is left to train.
    """
    parameters = {_plain(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    left_out = _without_text(model, parameters)
    for name in left_out:
        parameters[name].requires_grad_(False)
    for setting, patterns, trains in (("frozen", frozen, False), ("trained", trained, True)):
        for pattern in patterns:
            found = [name for name in parameters if fnmatchcase(name, pattern)]
            if not found:
                raise InputError(
                    f"model.{setting} has {pattern!r}, which matches no parameter. Expected names such as "
                    f"{next(iter(parameters))!r}; * matches anything."
                )
            if trains and (packed := [name for name in found if is_packed(parameters[name])]):
                raise InputError(f"model.trained has {pattern!r}, but {packed[0]} is quantized and cannot be trained.")
            if all(parameters[name].requires_grad is trains for name in found):
                raise InputError(
                    f"model.{setting} has {pattern!r}, but {found[0]} and all other matches are {setting} already. "
                    "Remove it; to train nothing else, set model.frozen=['*'] and model.trained."
                )
            for name in found:
                parameters[name].requires_grad_(trains)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise InputError(
            f"model.frozen={list(frozen)} leaves nothing to train. Freeze less, or list what to train in model.trained."
        )
    own = left_out if hasattr(model, "peft_config") else parameters  # with adapters, everything else is frozen
    untrained = (name for name in own if not parameters[name].requires_grad)
    return [name for name in untrained if not any(fnmatchcase(name, pattern) for pattern in frozen)]


def _without_text(model: PreTrainedModel, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of parameters that text does not use, such as a vision tower; DDP would wait for their gradients."""
    outside = {_plain(name) for name in outside_language_model(model)}
    return [name for name, own in parameters.items() if name in outside and own.requires_grad]


def _plain(name: str) -> str:
    """The name of a parameter in the pretrained model."""
    return re.sub(r"\.(base_layer\.)+", ".", name)
