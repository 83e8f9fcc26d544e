"""Which parameters an optimiser gets, in which groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_sft.sharding import by_mesh


def parameter_groups(parameters: Iterable[nn.Parameter], lr: float | None = None) -> list[dict[str, Any]]:
    """The trained ones: matrices as they are, norms and biases without weight decay; never a group of two meshes.

    Args:
        parameters: Of the module.
        lr: Learning rate of all groups; by default the optimiser's own.

    >>> import torch
    >>> layer = nn.Linear(2, 2)
    >>> [(len(group["params"]), group.get("weight_decay")) for group in parameter_groups(layer.parameters())]
    [(1, None), (1, 0.0)]
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    decayed = [parameter for parameter in trained if _num_dimensions(parameter) > 1]
    others = [parameter for parameter in trained if _num_dimensions(parameter) <= 1]
    rate = {} if lr is None else {"lr": lr}
    groups: list[dict[str, Any]] = [{"params": group, **rate} for group in by_mesh(decayed).values()]
    return groups + [{"params": group, "weight_decay": 0.0, **rate} for group in by_mesh(others).values()]


def _num_dimensions(parameter: Any) -> int:
    """Those of the whole parameter: under ZeRO-3 a rank holds a flat piece, and the shape is kept apart."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
