"""Context parallelism without other ranks: exchanges allocate what real ones do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sft.model.parallel.context import Context
from lightning_sft.types import Batch


class PaperContext(Context):
    """A rank among others that do not exist."""

    def joined(self, batch: Batch, *of_targets: Tensor) -> list[Tensor]:
        """Values of all targets of a batch, ``[T]`` each, of which this rank's are given."""
        return [values.new_zeros(len(batch.targets)) for values in of_targets]

    def _exchanged(self, chunks: Tensor) -> Tensor:
        exchange: Any = _Exchange
        received: Tensor = exchange.apply(chunks.contiguous())
        return received


class _Exchange(torch.autograd.Function):
    """What is received is as large as what is sent; its gradient likewise."""

    @staticmethod
    def forward(ctx: Any, chunks: Tensor) -> Tensor:
        return torch.empty_like(chunks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.empty_like(gradient.contiguous())
