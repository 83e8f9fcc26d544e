"""Gradient checkpointing: which layers are recomputed in the backward pass, and where their inputs are kept."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

from lightning_sft.io.arguments import Index
from lightning_sft.model.tiles import tile_mlps
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Checkpointing = bool | Literal["offload"] | Index
"""``True``: recompute all layers; ``"offload"``: keep their inputs in host memory, too; n: recompute every n-th."""


def checkpoint_layers(
    model: PreTrainedModel, setting: Checkpointing, device_type: str, tile_size: int | None = None
) -> None:
    """Enable gradient checkpointing in the layers of a model, and tiles in their MLPs, in place.

    Args:
        model: Model of transformers.
        setting: Value of ``model.gradient_checkpointing``.
        device_type: Type of the training device, such as ``cuda``.
        tile_size: Value of ``model.mlp_tile_size``, see :func:`lightning_sft.model.tiles.tile_mlps`.

    Raises:
        InputError: When transformers cannot recompute the layers of the architecture.
    """
    tile_mlps(model, tile_size)
    if not setting:
        return
    if not model.supports_gradient_checkpointing:
        raise InputError(
            f"model.gradient_checkpointing={setting} is not available for {type(model).__name__} in transformers. "
            "Leave it out."
        )
    offload = setting == "offload"
    if offload and device_type == "cpu":
        warnings.warn(
            "model.gradient_checkpointing=offload has no effect on a CPU, where activations are in host memory anyway; "
            "using true.",
            stacklevel=2,
        )
        offload = False
    every = 1 if isinstance(setting, str) else int(setting)
    model.activation_checkpointing_enable(every_n_layers=every, offload=offload)
