"""Context parallelism: the tokens of each row are split over ranks; around attention, the heads are split instead.

    [B, heads, N / C, head size]  -- all-to-all -->  [B, heads / C, N, head size]  -- attention, and back -->

A rank thus has all tokens of its heads while attention runs, whatever the documents, windows and sinks are, and only
its own tokens in all else (Jacobs et al. 2023, DeepSpeed Ulysses, arXiv:2309.14509). Heads of keys and values that are
fewer than the ranks are repeated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sft.types import Batch, InputError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Context:
    """The ranks that share the rows of a batch.

    Args:
        rank: Number of this rank in the group.
        size: Number of ranks that share rows, C.
        group: Process group of the ranks.
        tensor_parallel_size: Number of devices that the heads are split over beside.
    """

    rank: int
    size: int
    group: Any
    tensor_parallel_size: int = 1

    @classmethod
    def of(cls, mesh: DeviceMesh, tensor_parallel_size: int) -> Context:
        """The ranks along a mesh of one dimension."""
        return cls(mesh.get_local_rank(), mesh.size(), mesh.get_group(), tensor_parallel_size)

    def padded(self, positions: Tensor, spans: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """Positions ``[B, N]`` and lengths of documents, with a document of padding a row where C does not divide N."""
        num_rows, length = positions.shape
        more = -length % self.size
        if not more:
            return positions, tuple(spans)
        padding = torch.arange(more, device=positions.device, dtype=positions.dtype).expand(num_rows, more)
        filled, longer = 0, []
        for span in spans:
            filled += span
            longer += [span, more] if span and filled % length == 0 else [span]
        return torch.cat([positions, padding], 1), tuple(longer)

    def part(self, values: Tensor, fill: float = 0) -> Tensor:
        """This rank's columns of values, ``[B, N, *]`` to ``[B, ⌈N / C⌉, *]``; ``fill`` is the value of padding."""
        width = -(-values.shape[1] // self.size)
        before = (0, 0) * (values.ndim - 2)  # torch counts dimensions from the last
        padded = torch.nn.functional.pad(values, (*before, 0, width * self.size - values.shape[1]), value=fill)
        return padded[:, self.rank * width : (self.rank + 1) * width].contiguous()

    def to_heads(self, states: Tensor) -> Tensor:
        """All tokens of this rank's heads from its tokens of all heads: ``[B, H, n, D]`` to ``[B, h, N, D]``."""
        num_rows, heads, tokens, size = states.shape
        split = states.view(num_rows, self.size, heads // self.size, tokens, size).transpose(0, 1)
        joined = self._exchanged(split)  # [C, B, h, n, D], the first dimension in order of tokens
        return joined.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def to_tokens(self, states: Tensor) -> Tensor:
        """This rank's tokens of all heads from all tokens of its heads: ``[B, N, h, D]`` to ``[B, n, H, D]``."""
        num_rows, tokens, heads, size = states.shape
        split = states.view(num_rows, self.size, tokens // self.size, heads, size).transpose(0, 1)
        joined = self._exchanged(split)  # [C, B, n, h, D], the first dimension in order of heads
        return joined.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def repeated(self, keys: Tensor, num_heads: int) -> Tensor:
        """Keys or values ``[B, groups, n, D]`` with as many groups that each rank gets those of its heads.

        Raises:
            InputError: When that is not possible.
        """
        times = self.num_repeats(num_heads, keys.shape[1])
        return keys.repeat_interleave(times, 1) if times > 1 else keys

    def num_repeats(self, num_heads: int, num_groups: int) -> int:
        """How often keys and values are repeated, so that their number is a multiple of the ranks.

        Raises:
            InputError: When the ranks cannot share so many heads.
        """
        times = self.size // math.gcd(num_groups, self.size)
        if num_heads % self.size or num_heads // num_groups % times:
            raise InputError(
                f"trainer.strategy.context_parallel_size={self.size} does not fit {num_heads} attention heads on "
                f"{num_groups} of keys and values. Choose a divisor of the heads, or set it to 1 and "
                "model.gradient_checkpointing=offload."
            )
        return times

    def heads(self, of_all: Tensor) -> Tensor:
        """This rank's part of a value for each head, ``[H]``."""
        return of_all.chunk(self.size)[self.rank]

    def joined(self, batch: Batch, *of_targets: Tensor) -> list[Tensor]:
        """Values of all targets of a batch, ``[T]`` each, from those of this rank's targets; without gradients."""
        length = batch.labels.shape[1]
        width = -(-length // self.size)
        here = batch.targets % length // width == self.rank
        whole = of_targets[0].new_zeros(len(of_targets), len(here))
        whole[:, here] = torch.stack([values.detach().to(whole.dtype) for values in of_targets])
        torch.distributed.all_reduce(whole, group=self.group)
        return [row.to(values.dtype) for row, values in zip(whole, of_targets, strict=True)]

    def summed(self, value: Tensor) -> Tensor:
        """The sum of a value of each rank, without gradients."""
        total = value.detach().clone()
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def _exchanged(self, chunks: Tensor) -> Tensor:
        """Chunk number r goes to rank r, and chunk number r of the result is from it."""
        from torch.distributed._functional_collectives import all_to_all_single_autograd  # in compiled layers too

        counts = [1] * self.size
        exchanged: Tensor = all_to_all_single_autograd(chunks.contiguous(), counts, counts, self.group)
        return exchanged
