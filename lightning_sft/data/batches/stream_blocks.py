"""A block of a stream: some thousand rows of each rank, shuffled and packed among themselves, dealt out in steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from lightning_sft.data.batches.collate import collate
from lightning_sft.data.batches.packing import PARTITIONS, Packing
from lightning_sft.data.tokens.encode_rows import Chunk
from lightning_sft.data.tokens.examples import Examples
from lightning_sft.data.tokens.row_report import RowReport
from lightning_sft.types import Batch


@dataclass(frozen=True)
class StreamLayout:
    """Settings that determine the rows of a micro-batch. A run resumes only with the shape that it began with.

    Args:
        num_ranks: Data-parallel size.
        accumulate: Micro-batches of a rank in one optimizer step.
        capacity: Maximum number of positions in a micro-batch; longer sequences get a separate one.
        packing: ``packed`` or ``padded``.
        buffer_rows: Rows of a rank that are shuffled and packed among themselves.
        seed: Seed of the order.
    """

    num_ranks: int
    accumulate: int
    capacity: int
    packing: Packing
    buffer_rows: int
    seed: int


@dataclass(frozen=True)
class RankSummary:
    """What one rank tells the others of its part of a block.

    Args:
        weights: Sum of target weights of each of its packs.
        targets: Target tokens of each data set.
        account: Account of the rows of the block.
        is_over: Whether its rows have ended.
        error: Error that stops the stream.
    """

    weights: Sequence[float]
    targets: Sequence[int]
    account: RowReport
    is_over: bool
    error: str | None = None


class Block:
    """What one rank has of a block, encoded and packed.

    Args:
        chunks: Chunks of encoded rows; empty at the end of the stream.
        shape: Settings that determine the rows of a micro-batch.
        place: Epoch, number of the block, and rank: seeds of the order.
        part_names: The data sets of the mixture.
        pad_id: Token id of padding.
        full: Whether packed rows are filled up to the capacity.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        shape: StreamLayout,
        place: tuple[int, int, int],
        part_names: Sequence[str],
        pad_id: int,
        *,
        full: bool = False,
    ) -> None:
        self.examples = Examples([chunk.records for chunk in chunks])
        self.is_over, self.account = not chunks, RowReport()
        self.parts = [chunk.part for chunk in chunks for _ in range(len(chunk.records))]
        for chunk in chunks:
            self.account.add(chunk.account)
        lengths, random = self.examples.lengths, np.random.default_rng([shape.seed, *place])
        order = random.permutation(len(lengths))
        capacity = max(shape.capacity, *lengths.tolist(), 0)
        packs = PARTITIONS[shape.packing](lengths[order], capacity)
        self.packs: list[list[int]] = [order[packs[i]].tolist() for i in random.permutation(len(packs))]
        self._num_parts = max(1, len(part_names))
        is_packed, fill = shape.packing == "packed", capacity if full else 0
        self._collate = partial(collate, packed=is_packed, fill=fill, pad_id=pad_id, part_names=part_names)

    def share(self, error: str | None) -> RankSummary:
        """What the other ranks have to know of it."""
        weights, num_targets = self.examples.weights, self.examples.num_targets
        sums = [math.fsum(weights[pack]) for pack in self.packs]
        targets = np.bincount(np.asarray(self.parts, dtype=int), num_targets, self._num_parts).astype(int).tolist()
        return RankSummary(sums, targets, self.account, self.is_over, error)

    def batch(self, number: int | None, normalizer: float) -> Batch:
        """One of its packs as a micro-batch; without a number, an empty one."""
        chosen = [] if number is None else self.packs[number]
        return self._collate([self.examples[i] for i in chosen], normalizer, parts=[self.parts[i] for i in chosen])


def deal(
    weights: Sequence[Sequence[float]], accumulate: int, rank: int, limit: float = math.inf
) -> list[tuple[int | None, float]]:
    """The packs of a rank in order, each with the Z of its step; ``None`` is an empty micro-batch.

    Args:
        weights: Total target weight of each pack of each rank.
        accumulate: Micro-batches of a rank in one optimizer step.
        rank: Rank whose packs are dealt.
        limit: Number of micro-batches that are used.

    >>> deal([[1.0, 2.0, 4.0], [8.0]], accumulate=2, rank=0)
    [(0, 1.0), (None, 1.0), (1, 14.0), (2, 14.0)]
    >>> deal([[1.0, 2.0, 4.0], [8.0]], accumulate=2, rank=1)
    [(None, 1.0), (None, 1.0), (0, 14.0), (None, 14.0)]
    """
    num_steps = math.ceil(max(map(len, weights)) / accumulate)
    dealt: list[tuple[int | None, float]] = []
    for step in range(num_steps):
        windows = [range(len(w) * step // num_steps, len(w) * (step + 1) // num_steps) for w in weights]
        left = limit - step * accumulate
        counted = [window[: int(min(left, accumulate))] if left > 0 else window for window in windows]
        normalizer = math.fsum(own[i] for own, window in zip(weights, counted, strict=True) for i in window)
        mine = [*windows[rank], *[None] * accumulate]
        dealt += [(pack, normalizer) for pack in mine[:accumulate]]
    return dealt
