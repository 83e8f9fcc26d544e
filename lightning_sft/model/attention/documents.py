"""Which tokens of a row attend to which, as the lengths of its documents instead of a matrix."""

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

_LEAST_QUERIES = 128  # at a time under a sliding window: fewer cost more in calls than they save


@dataclass(frozen=True)
class OneCall:
    """What the operator for packed attention takes on a device, see :mod:`lightning_sft.model.attention.operator`.

    Plain values, so that compiled layers can read them without a graph break.

    Args:
        dtypes: Of queries, keys and values.
        largest_head: Largest head size; a multiple of 8 is needed as well. ``None`` where any size will do.
        drops_out: Whether attention weights can be dropped out.
        small_memory: Whether the GPU's shared memory is too small for some backward passes of heads above 192.
    """

    dtypes: tuple[torch.dtype, ...]
    largest_head: int | None = None
    drops_out: bool = False
    small_memory: bool = False

    def takes(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
        """Whether the operator computes this; the last dimension of the tensors is the head size."""
        size = query.shape[-1]
        if not size == key.shape[-1] == value.shape[-1] or computed_in(query) not in self.dtypes:
            return False
        if dropout and not self.drops_out:
            return False
        if self.small_memory and size > 192 and (dropout or size <= 224):
            return False
        return self.largest_head is None or (size <= self.largest_head and size % 8 == 0)


class Documents:
    """Documents laid end to end, in each of which a token attends to itself and to what is before it.

    It takes the place of the mask that transformers hands to each layer. Models pass that on and do not look into it;
    those that do are found out when they are loaded, see :mod:`lightning_sft.model.attention.choice`.

    Args:
        lengths: Tokens of each document; their sum is that of all tokens of all rows.
        window: How many tokens a token sees, itself included, or ``None`` for all of its document.
        device: Where the tokens are.
        dtype: Of masks that are added to scores, or ``None`` for masks that are true where a token is seen.

    Attributes:
        one_call: What the operator takes on this device, or ``None`` where it has no kernel.
        blocks: FlexAttention's block mask, or ``None`` where FlexAttention is not used.

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
        self.one_call: OneCall | None = None
        self.blocks: Any = None

    @classmethod
    def found(
        cls, sees: Callable[..., Tensor], positions: Tensor, window: int | None, dtype: torch.dtype | None
    ) -> Documents | None:
        """The documents of rows, or ``None`` where tokens see something else than what is before them in a document.

        A mask is asked at four places a token: for the token itself, the one after it, the one before it, and the
        furthest one that it should see. Where it is not to see the one before it a document begins, or a chunk of
        chunked attention, which is the same. The answer is waited for.

        Args:
            sees: A mask function of transformers, of row, head, query and key.
            positions: Position of each token in its document, ``[B, N]``.
            window: That of the mask function.
            dtype: See above.
        """
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
        facts = torch.cat([begins.flatten(), holds[None]]).cpu()  # the one time that a device is waited for
        return cls(lengths_from(facts[:-1]), window, positions.device, dtype) if facts[-1] else None

    @cached_property
    def bounds(self) -> Tensor:
        """Where each document begins, and the last one ends, ``[D + 1]`` of int32 on the device."""
        bounds = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device="cpu")
        bounds = without_waiting(bounds, self.device)
        torch._dynamo.maybe_mark_dynamic(bounds, 0)  # else the second batch has all layers compiled once more
        return bounds

    @cached_property
    def longest(self) -> Tensor:
        """Tokens of the longest document, a scalar on the CPU: with an integer, layers are compiled for each value."""
        return torch.tensor(max(self.lengths), device="cpu")

    def prepare(self) -> None:
        """Make what layers read, so that none of it is made inside a compiled layer."""
        _ = self.bounds, self.longest

    @property
    def widest(self) -> int | None:
        """The window, or ``None`` where no document is longer than it."""
        return None if self.window is None or self.window >= max(self.lengths) else self.window

    def pieces(self, length: int) -> Iterator[tuple[int, int, int]]:
        """Where to cut a document: queries from and to, and the first key that they see; a window needs few keys."""
        if self.window is None or length <= self.window:
            yield 0, length, 0
            return
        step = max(self.window, _LEAST_QUERIES)
        for begin in range(0, length, step):
            yield begin, min(begin + step, length), max(0, begin - self.window + 1)

    def mask(self, begin: int, end: int, first: int) -> Tensor | None:
        """The mask of a piece, ``[1, 1, queries, keys]``; ``None`` where being causal says it all."""
        if self.dtype is None and (self.window is None or end <= self.window):
            return None
        return self._band[:, :, begin - first : end - first, : end - first]

    @cached_property
    def _band(self) -> Tensor:
        """The mask of the largest piece: those of all others are parts of it."""
        size = max(end - first for length in set(self.lengths) for _, end, first in self.pieces(length))
        seen = torch.ones(1, 1, size, size, dtype=torch.bool, device=self.device).tril()
        if self.widest is not None:
            seen = seen.triu(1 - self.widest)
        if self.dtype is None:
            return seen
        none: Any = torch.finfo(self.dtype).min
        return torch.where(seen, torch.zeros((), dtype=self.dtype, device=self.device), none)


def lengths_from(begins: Tensor) -> list[int]:
    """Lengths of documents from where they begin, a boolean tensor ``[T]`` on the CPU."""
    ends = torch.tensor([begins.numel()], device="cpu")
    lengths: list[int] = torch.cat([begins.nonzero()[:, 0], ends]).diff().tolist()
    return lengths
