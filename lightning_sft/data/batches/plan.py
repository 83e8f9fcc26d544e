"""The plan of an epoch: which micro-batch each rank takes when, and the normalizer of each optimizer step.

A pure function of (seed, epoch, number of ranks): every rank computes the same plan and takes its own column, so that
ranks never talk about data, and a killed run finds its place again.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from lightning_sft.data.batches.packing import Packs
from lightning_sft.data.batches.sampling import EpochSampler, longest_first

Partition = Callable[[NDArray[np.int64]], Packs | list[list[int]]]


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes at a time.

    Args:
        examples: Indices of the examples; empty if the rank only participates to keep collectives in step.
        normalizer: Z of the optimizer step it belongs to.
        step_weight: Sum of the target weights of that step; Z itself, but for a constant Z.
    """

    examples: tuple[int, ...]
    normalizer: float
    step_weight: float


class MicroBatches(Sequence[MicroBatch]):
    """The micro-batches of a rank in an epoch, as arrays.

    Args:
        packs: Examples of each micro-batch.
        step_weights: Sum of the target weights of each optimizer step.
        accumulate: Micro-batches in one optimizer step.
        constant: Z of all steps; by default, Z of a step is its weight.
        first: Number of micro-batches of the epoch before these.
    """

    def __init__(
        self,
        packs: Packs,
        step_weights: Sequence[float],
        accumulate: int,
        constant: float | None = None,
        first: int = 0,
    ) -> None:
        self.packs, self._step_weights, self._accumulate = packs, step_weights, accumulate
        self._constant, self._first = constant, first

    def __len__(self) -> int:
        return len(self.packs)

    @overload
    def __getitem__(self, number: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[MicroBatch]: ...
    def __getitem__(self, number: int | slice) -> MicroBatch | Sequence[MicroBatch]:
        if isinstance(number, slice):
            begin, _, step = number.indices(len(self))
            if step != 1:
                return list(self)[number]
            first = self._first + begin
            return MicroBatches(self.packs[number], self._step_weights, self._accumulate, self._constant, first)
        number = range(len(self))[number]
        weight = self._step_weights[(self._first + number) // self._accumulate]
        return MicroBatch(tuple(self.packs[number].tolist()), self._constant or weight, weight)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as lists


@dataclass(frozen=True)
class Division:
    """How Lightning divides the work of an epoch.

    Args:
        rank: Data-parallel rank.
        num_ranks: Data-parallel size.
        accumulate: Micro-batches of a rank in one optimizer step.
        limit: Micro-batches of a rank that an epoch uses: an int, or the share of them, a float.
        num_local: Processes on this machine.
    """

    rank: int = 0
    num_ranks: int = 1
    accumulate: int = 1
    limit: int | float = 1.0
    num_local: int = 1


class EpochPlan:
    """Packs of a data set, and how each epoch deals them out.

    Each epoch redraws which examples of equal length trade places and in what order packs come. A step's packs are
    spread so that steps differ by one pack at most, and every rank gets the same number of micro-batches, a multiple of
    ``accumulate``: missing ones are empty.

    Args:
        lengths: Tokens of each example.
        weights: Sum of target weights of each example.
        partition: Lengths to micro-batches of indices, as :func:`lightning_sft.data.batches.packing.pack` does.
        draw: Sampler of the examples of an epoch; by default each once.
        num_ranks: Data-parallel size.
        accumulate: Micro-batches of a rank in one optimizer step.
        constant: Whether Z is the same for all steps, the mean sum of weights, and not the step's own.
        limit: Micro-batches of a rank that an epoch will use: an int, or the share of them, a float. The Z of a step
            that it cuts is that of what is left.
        seed: Seed of the order; ``None`` keeps longest first, for validation.

    >>> from lightning_sft.data.batches.packing import pack
    >>> plan = EpochPlan([4, 4, 3, 1], [2.0, 2.0, 1.0, 1.0], lambda x: pack(x, capacity=4), num_ranks=2, seed=None)
    >>> [[micro.examples for micro in plan.micro_batches(epoch=0, rank=rank)] for rank in (0, 1)]
    [[(0,), (1,)], [(), (2, 3)]]
    >>> [micro.normalizer for micro in plan.micro_batches(epoch=0, rank=0)]
    [2.0, 4.0]
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.int64],
        weights: Sequence[float] | NDArray[np.float64],
        partition: Partition,
        *,
        draw: EpochSampler | None = None,
        num_ranks: int = 1,
        accumulate: int = 1,
        constant: bool = False,
        limit: int | float = 1.0,
        seed: int | None = 0,
    ) -> None:
        self._lengths, self._weights = np.asarray(lengths, np.int64), np.asarray(weights, np.float64)
        self.draw = draw or EpochSampler(lengths, [len(lengths)], [1.0], seed)
        self.packs = Packs.of(partition(np.sort(self.draw.bounds)[::-1]))  # of places, the longest first
        self.num_ranks, self.accumulate, self.seed = num_ranks, accumulate, seed
        self.num_full_steps = math.ceil(len(self.packs) / (num_ranks * accumulate))
        self.num_micro_batches = self.num_full_steps * accumulate
        share = limit if isinstance(limit, int) else int(limit * self.num_micro_batches)
        self._used = min(share, self.num_micro_batches)
        self.num_steps = math.ceil(self._used / accumulate)
        self._constant = math.fsum(np.asarray(weights) * self.draw.rates) / self.num_full_steps if constant else None

    @property
    def fingerprint(self) -> str:
        """What decides which examples a step has, and how an epoch's steps are cut; not how ranks share them."""
        used, everything = self._used * self.num_ranks, self.num_micro_batches * self.num_ranks
        checksum = zlib.crc32((-self._lengths).tobytes() + repr(self.draw.counts).encode())
        sequences = f"{len(self._lengths):,} sequences (checksum {checksum:08x})"
        return (
            f"{sequences} in {len(self.packs):,} micro-batches, {used:,} of {everything:,} used, data.seed={self.seed}"
        )

    def micro_batches(self, epoch: int, rank: int) -> MicroBatches:
        """The micro-batches that one rank uses in one epoch, in order: a resumed epoch ends at the limit, too."""
        random = None if self.seed is None else np.random.default_rng([self.seed, epoch])
        drawn = self.draw.epoch(epoch)
        ties = np.arange(len(drawn)) if random is None else random.permutation(len(drawn))
        examples = drawn[longest_first(self._lengths[drawn], ties)]
        order = np.arange(len(self.packs)) if random is None else random.permutation(len(self.packs))
        packs = self.packs.take(order)
        packs = Packs(examples[packs.indices], packs.bounds)
        begins = np.arange(self.num_full_steps + 1) * len(packs) // self.num_full_steps  # of steps, in packs
        begins, ends = begins[: self.num_steps], begins[1 : self.num_steps + 1]
        mine = begins[:, None] + np.arange(self.accumulate) * self.num_ranks + rank  # [steps, accumulate]
        mine = np.where(mine < ends[:, None], mine, -1).ravel()[: self._used]
        return MicroBatches(packs.take(mine), self._step_weights(packs, begins, ends), self.accumulate, self._constant)

    def _step_weights(self, packs: Packs, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> list[float]:
        """Sum of the target weights of each step that an epoch uses, from all packs in order and those of each step."""
        left = self._used - np.arange(self.num_steps) * self.accumulate  # turns of the ranks; a limit may cut the last
        counted = np.minimum(ends, begins + left * self.num_ranks)
        weights, bounds = self._weights[packs.indices], packs.bounds
        pairs = zip(bounds[begins].tolist(), bounds[counted].tolist(), strict=True)
        return [math.fsum(weights[begin:end].tolist()) for begin, end in pairs]
