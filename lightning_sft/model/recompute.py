"""Gradient checkpointing: which layers are computed again in the backward pass, and where their inputs are kept."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

from lightning_sft.io.arguments import Index

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Checkpointing = bool | Literal["offload"] | Index
"""All layers are computed again in the backward pass; all, with inputs in host memory; or every n-th. Else none is."""


def checkpoint_layers(model: PreTrainedModel, setting: Checkpointing, device_type: str) -> None:
    """Have layers of a model computed again in the backward pass, in place.

    Args:
        model: Of transformers.
        setting: ``model.gradient_checkpointing``.
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
