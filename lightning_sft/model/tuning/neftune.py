"""NEFTune: noise on embeddings during training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.types import IGNORE, Batch


def add_noise(scorer: nn.Module, model: PreTrainedModel, alpha: float) -> None:
    """Add ``alpha / √(N · H) · ε``, ε uniform in (−1, 1), to embeddings during training (Jain et al. 2023, NEFTune).

    N is the length of a document up to its last target, whether it shares a row with others or is padded, so the noise
    does not depend on packing. It is drawn from torch's default generator.

    Args:
        scorer: Module that contains the model; noise is added only while it runs on a :class:`Batch` in training mode.
        model: Model whose embeddings receive the noise.
        alpha: Scale of the noise, 5 to 15 in the paper.
    """
    under_way: list[Tensor] = []

    def begin(scorer: nn.Module, args: tuple[Any, ...]) -> None:
        under_way[:] = [lengths(args[0])] if scorer.training and isinstance(args[0], Batch) else []  # no prompts

    def end(*_: Any) -> None:
        under_way.clear()

    def noisy(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not under_way:
            return None
        scale = alpha / (under_way[0] * output.shape[-1]).sqrt()  # [B, N]
        noise = torch.rand_like(output) * 2 - 1
        return output + noise * scale[..., None].to(output.dtype)

    scorer.register_forward_pre_hook(begin)
    scorer.register_forward_hook(end, always_call=True)
    model.get_input_embeddings().register_forward_hook(noisy)


def lengths(batch: Batch) -> Tensor:
    """Length, up to the last target, of the document of each position, ``[B, N]``.

    >>> from lightning_sft.data.batches.collate import collate
    >>> from lightning_sft.types import Example
    >>> three, two = Example([5, 6, 7], [0, 0, 1]), Example([8, 9], [0, 1])
    >>> lengths(collate([three, two])).tolist(), lengths(collate([three, two], packed=False)).tolist()
    ([[3, 3, 3, 2, 2]], [[3, 3, 3], [2, 2, 2]])
    """
    documents = batch.documents()
    ends = torch.where(batch.labels != IGNORE, batch.position_ids + 2, 1)  # a label is the token after its position
    count = len(batch.spans) or int(documents.max()) + 1  # without spans this waits for the device
    longest = ends.new_ones(count).scatter_reduce(0, documents.flatten(), ends.flatten(), "amax")
    return longest[documents]
