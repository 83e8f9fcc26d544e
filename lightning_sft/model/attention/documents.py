"""The attention mask of packed documents, as their lengths instead of a matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightning_sft.machine.contexts import computed_in
from lightning_sft.machine.host_copy import without_waiting
from lightning_sft.model.parallel.context import Context

_LEAST_QUERIES = 128  # per piece under a sliding window: smaller pieces cost more in calls than they save


@dataclass(frozen=True)
class OneCall:
    """What the packed-attention operator supports on a device, see :mod:`lightning_sft.model.attention.operator`.

    Plain values, which compiled layers read without a graph break.

    Args:
        dtypes: Supported dtypes of queries, keys and values.
        largest_head: Maximum head size, which must also be a multiple of 8; ``None`` if any size is supported.
        drops_out: Whether dropout of attention weights is supported.
        small_memory: Whether the GPU's shared memory is too small for some backward passes of head sizes above 192.
    """

    dtypes: tuple[torch.dtype, ...]
    largest_head: int | None = None
    drops_out: bool = False
    small_memory: bool = False

    def takes(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
        """Whether the operator supports these tensors, ``[..., head size]``, and this dropout probability."""
        size = query.shape[-1]
        if not size == key.shape[-1] == value.shape[-1] or computed_in(query) not in self.dtypes:
            return False
        if dropout and not self.drops_out:
            return False
        if self.small_memory and size > 192 and (dropout or size <= 224):
            return False
        return self.largest_head is None or (size <= self.largest_head and size % 8 == 0)


class Documents:
    """Documents laid end to end, with causal attention within each.

    It replaces the mask that transformers passes to each layer. Models pass that on without reading it; those that read
    it are detected on loading, see :mod:`lightning_sft.model.attention.choice`.

    Args:
        lengths: Number of tokens of each document; they add up to the tokens of all rows.
        window: Number of tokens that a token attends to, itself included; ``None`` for no limit within its document.
        device: Device of the tokens.
        dtype: Dtype of additive masks, or ``None`` for boolean masks, which are true where a token attends to another.

    Attributes:
        context: Ranks that the tokens of a layer are split over, or ``None`` if this one has them all.
        one_call: What the operator supports on this device, or ``None`` if it has no kernel.
        blocks: FlexAttention's block mask, or ``None`` if FlexAttention is not used.

    >>> documents = Documents([2, 3])
    >>> documents.bounds.tolist(), documents.longest.item()
    ([0, 2, 5], 3)
    """

    def __init__(
        self,
        lengths: Sequence[int],
        window: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.lengths, self.window, self.device, self.dtype = list(lengths), window, device, dtype
        self.context: Context | None = None
        self.one_call: OneCall | None = None
        self.blocks: Any = None

    @classmethod
    def found(
        cls, sees: Callable[..., Tensor], positions: Tensor, window: int | None, dtype: torch.dtype | None
    ) -> Documents | None:
        """The documents that a mask function describes, or ``None`` if it is not causal attention within documents.

        The mask is evaluated at four keys per token: the token itself, the next one, the previous one, and the furthest
        one that it should attend to. A document, or a chunk of chunked attention, which is equivalent, begins where a
        token does not attend to the previous one. The host waits for the result.

        Args:
            sees: Mask function of transformers, of row, head, query and key indices.
            positions: Position of each token in its document, ``[B, N]``.
            window: Sliding window of the mask function, in tokens.
            dtype: Dtype of additive masks, or ``None`` for boolean masks.
        """
        if window is not None and window < 1:  # of a mask that Qwen2-MoE makes for layers that it does not have
            return None
        num_rows, length = positions.shape
        here = torch.arange(length, device=positions.device)
        rows, head = torch.arange(num_rows, device=positions.device)[:, None], here.new_zeros(())

        def ask(query: Tensor, key: Tensor) -> Tensor:  # [B, N] or [N] -> [B, N]
            return sees(rows, head, query, key).expand(num_rows, query.shape[-1])

        begins = torch.ones_like(positions, dtype=torch.bool)
        begins[:, 1:] = ~ask(here[1:], here[:-1]) | (positions.diff(dim=1) != 1)
        begin = torch.where(begins, here, 0).cummax(1).values
        furthest = begin if window is None else torch.maximum(begin, here - (window - 1))
        holds = ask(here, here).all() & ask(here.expand_as(begin), furthest).all() & ~ask(here[:-1], here[1:]).any()
        if window is not None and window < length:
            in_same = here[:-window] >= begin[:, window:]
            holds = holds & ~(ask(here[window:], here[:-window]) & in_same).any()
        facts = torch.cat([begins.flatten(), holds[None]]).cpu()  # the only synchronization with the device
        return cls(lengths_from(facts[:-1]), window, positions.device, dtype) if facts[-1] else None

    @cached_property
    def bounds(self) -> Tensor:
        """Cumulative lengths, ``[D + 1]`` of int32 on the device: starts of the documents, and the end of the last."""
        bounds = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device="cpu")
        bounds = without_waiting(bounds, self.device)
        torch._dynamo.maybe_mark_dynamic(bounds, 0)  # else the second batch recompiles all layers
        return bounds

    @cached_property
    def longest(self) -> Tensor:
        """Length of the longest document, a CPU scalar: with an integer, layers would be recompiled for each value."""
        return torch.tensor(max(self.lengths), device="cpu")

    def prepare(self) -> None:
        """Compute the tensors that layers read, so that compiled layers do not."""
        _ = self.bounds, self.longest

    @property
    def widest(self) -> int | None:
        """The window, or ``None`` if no document is longer than it."""
        return None if self.window is None or self.window >= max(self.lengths) else self.window

    def pieces(self, length: int) -> Iterator[tuple[int, int, int]]:
        """Pieces of a document: start and end of their queries, and the first key that these attend to."""
        if self.window is None or length <= self.window:
            yield 0, length, 0
            return
        step = max(self.window, _LEAST_QUERIES)
        for begin in range(0, length, step):
            yield begin, min(begin + step, length), max(0, begin - self.window + 1)

    def mask(self, begin: int, end: int, first: int) -> Tensor | None:
        """The mask of a piece, ``[1, 1, queries, keys]``, or ``None`` if it is plainly causal."""
        if self.dtype is None and (self.window is None or end <= self.window):
            return None
        return self._band[:, :, begin - first : end - first, : end - first]

    @cached_property
    def _band(self) -> Tensor:
        """The mask of the largest piece, of which all other masks are slices."""
        size = max(end - first for length in set(self.lengths) for _, end, first in self.pieces(length))
        seen = torch.ones(1, 1, size, size, dtype=torch.bool, device=self.device).tril()
        if self.widest is not None:
            seen = seen.triu(1 - self.widest)
        if self.dtype is None:
            return seen
        none: Any = torch.finfo(self.dtype).min
        return torch.where(seen, torch.zeros((), dtype=self.dtype, device=self.device), none)


def lengths_from(begins: Tensor) -> list[int]:
    """Lengths of documents, from a boolean tensor ``[T]`` on the CPU that is true where a document begins."""
    ends = torch.tensor([begins.numel()], device="cpu")
    lengths: list[int] = torch.cat([begins.nonzero()[:, 0], ends]).diff().tolist()
    return lengths
