"""Rotary embeddings whose frequencies depend on the length of a sequence: each document gets those of its own length.

transformers takes one length for a whole batch, that of its longest document, and ``dynamic`` keeps that of an earlier
batch. A document would thus be computed with other frequencies than alone, depending on what else is in its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_sft.machine.host_copy import without_waiting
from lightning_sft.model.attention import masks


def follow_documents(model: PreTrainedModel) -> None:
    """Compute the rotary embeddings of each document as if it were alone, where its length matters.

    Args:
        model: Model to change in place. Outside of batches of documents, as in generation, it is as before.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if any(map(_varies, kinds.values() if isinstance(kinds, dict) else [kinds])):
            module.forward = partial(_of_documents, type(module).forward, module)


def _varies(kind: Any) -> bool:
    """Whether frequencies of this type of rotary embeddings depend on the length of a sequence."""
    return kind == "longrope" or "dynamic" in str(kind)


def _of_documents(
    forward: Callable[..., tuple[Tensor, Tensor]],
    module: Any,
    x: Tensor,
    position_ids: Tensor,
    layer_type: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions, ``[B, N]`` to ``[B, N, D]`` each."""
    of_type = {} if layer_type is None else {"layer_type": layer_type}
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    rows = masks.current()
    if rows is None or not _varies(kind) or position_ids.shape != rows.here.shape:
        return forward(module, x, position_ids, **of_type)
    settings = module.config.rope_parameters
    settings = settings if layer_type is None else settings[layer_type]
    is_long = kind == "longrope"
    trained = settings["original_max_position_embeddings"] if is_long else module.original_max_seq_len
    lengths = rows.lengths()
    classes = (lengths > trained) * lengths.max() if is_long else lengths.clamp(min=trained) * (lengths > trained)

    def of_length(length: int) -> tuple[Tensor, Tensor]:
        """As if the longest sequence were of this length: it is read off the largest position."""
        last = position_ids.new_full((len(position_ids), 1), length - 1)
        cos, sin = forward(module, x, torch.cat([position_ids.clamp(max=length - 1), last], 1), **of_type)
        return cos[:, :-1], sin[:, :-1]

    if not is_long:  # only a short sequence makes it forget an earlier one
        forward(module, x, torch.zeros_like(position_ids[:, :1]), **of_type)
    first, *others = classes.unique().tolist()  # in ascending order, since dynamic frequencies follow only longer ones
    cos, sin = of_length(first or trained)
    for length in others:
        theirs = without_waiting(classes == length, x.device)[..., None]
        of_cos, of_sin = of_length(length)
        cos, sin = torch.where(theirs, of_cos, cos), torch.where(theirs, of_sin, sin)
    return cos, sin
