"""Gradient checkpointing: which layers are computed again in the backward pass, and where their inputs are kept."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from lightning_sft.types import InputError

Checkpointing = bool | Literal["offload"] | int
"""Which layers are computed again in the backward pass, and whether their inputs are kept in host memory."""


def check_checkpointing(setting: Any) -> None:
    """Refuse what is none of the choices.

    Args:
        setting: ``model.gradient_checkpointing``.

    Raises:
        InputError: When it is none.
    """
    if setting != "offload" and (not isinstance(setting, int) or setting < 0):
        raise InputError(
            f"model.gradient_checkpointing is {setting!r}; expected false, true (every layer), offload (every layer, "
            "whose input is kept in host memory), or a number n: every n-th layer."
        )


def checkpoint_layers(model: Any, setting: Checkpointing, device_type: str) -> None:
    """Have layers of a model computed again in the backward pass, in place.

    Args:
        model: Of transformers.
        setting: Checked by :func:`check_checkpointing`.
        device_type: Where it is trained, as ``cuda``.
    """
    if not setting:
        return
    offload = setting == "offload"
    if offload and device_type == "cpu":
        warnings.warn(
            "model.gradient_checkpointing=offload has no effect on a CPU, whose activations are in host memory anyway: "
            "it is taken as true.",
            stacklevel=2,
        )
        offload = False
    every = 1 if isinstance(setting, str) else int(setting)
    model.activation_checkpointing_enable(every_n_layers=every, offload=offload)
