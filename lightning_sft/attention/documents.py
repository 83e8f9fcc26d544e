"""Which tokens of a row attend to which, as the lengths of its documents instead of a matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_LEAST_QUERIES = 128  # at a time under a sliding window: fewer cost more in calls than they save


class Documents:
    """Documents laid end to end, in each of which a token attends to itself and to what is before it.

    It takes the place of the mask that transformers hands to each layer. Models pass that on and do not look into it;
    those that do are found out when they are loaded, see :mod:`lightning_sft.attention.choice`.

    Args:
        lengths: Tokens of each document; their sum is that of all tokens of all rows.
        window: How many tokens a token sees, itself included, or ``None`` for all of its document.
        device: Where the tokens are.
        dtype: Of masks that are added to scores, or ``None`` for masks that are true where a token is seen.

    >>> documents = Documents([2, 3])
    >>> documents.bounds.tolist(), documents.longest
    ([0, 2, 5], 3)
    """

    def __init__(
        self,
        lengths: list[int],
        window: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.lengths, self.longest = lengths, max(lengths)
        self.window = window if window is not None and window < self.longest else None
        self.device, self.dtype = device, dtype

    @classmethod
    def found(
        cls, sees: Callable[..., Tensor], positions: Tensor, window: int | None, dtype: torch.dtype | None
    ) -> Documents | None:
        """The documents of rows, or ``None`` where tokens see something else than what is before them in a document.

        A mask is asked at four places a token: for the token itself, the one after it, the one before it, and the
        furthest one that it should see. Where it is not to see the one before it a document begins, or a chunk of
        chunked attention, which is the same.

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
        if not facts[-1]:
            return None
        bounds = torch.cat([facts[:-1].nonzero()[:, 0], torch.tensor([positions.numel()], device="cpu")])
        return cls(bounds.diff().tolist(), window, positions.device, dtype)

    @cached_property
    def bounds(self) -> Tensor:
        """Where each document begins, and the last one ends, ``[D + 1]``, as kernels for uneven lengths want it."""
        return torch.tensor([0, *self.lengths], device=self.device).cumsum(0, dtype=torch.int32)

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
        size = max(end - first for length in {self.longest, *self.lengths} for _, end, first in self.pieces(length))
        seen = torch.ones(1, 1, size, size, dtype=torch.bool, device=self.device).tril()
        if self.window is not None:
            seen = seen.triu(1 - self.window)
        if self.dtype is None:
            return seen
        none: Any = torch.finfo(self.dtype).min
        return torch.where(seen, torch.zeros((), dtype=self.dtype, device=self.device), none)


def computed_in(query: Tensor) -> torch.dtype:
    """Dtype of a layer's attention: that of autocast where it is on."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
