"""Which examples an epoch uses, where it does not use each exactly once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def longest_first(lengths: IntArray, ties: IntArray) -> IntArray:
    """Order of lengths from the longest on, those of equal length by ``ties``, a permutation; in one sort.

    >>> longest_first(np.array([5, 7, 5]), ties=np.array([2, 1, 0])).tolist()
    [1, 2, 0]
    """
    return np.argsort((lengths.max(initial=0) - lengths) * len(lengths) + ties)


class EpochSampler:
    """A number of examples of each part for every epoch, each example of a part as often as any other.

    An epoch has whole passes over a part, and of the rest every n/r-th example in order of length: r of n. From epoch
    to epoch that comb moves on by one tooth's example, so that over the epochs no example is ever ahead of another by
    more than one use. Whichever are drawn, the i-th longest of them is at most as long as the i-th of ``bounds``: packs
    that are made for the bounds fit every epoch.

    Args:
        lengths: Tokens of each example, part after part.
        sizes: Examples of each part.
        repeats: Average number of uses of each example per epoch, for each part.
        seed: Seed of the order among examples of equal length; ``None`` keeps it.

    >>> draw = EpochSampler([9, 8, 7, 6, 5, 5], sizes=[4, 2], repeats=[0.5, 2.0], seed=0)
    >>> [sorted(draw.epoch(number).tolist()) for number in (0, 1)]
    [[0, 2, 4, 4, 5, 5], [1, 3, 4, 4, 5, 5]]
    >>> draw.bounds.tolist()
    [9, 7, 5, 5, 5, 5]
    """

    def __init__(
        self, lengths: Sequence[int] | IntArray, sizes: Sequence[int], repeats: Sequence[float], seed: int | None
    ) -> None:
        random = None if seed is None else np.random.default_rng(seed)
        everything = np.asarray(lengths, dtype=np.int64)
        self.counts = [max(1, round(size * times)) for size, times in zip(sizes, repeats, strict=True)]
        self._parts: list[tuple[IntArray, int]] = []  # the examples of each part, longest first, and how many it gives
        bounds = []
        begin = 0
        for size, count in zip(sizes, self.counts, strict=True):
            own = np.arange(begin, begin + size)
            ties = np.arange(size) if random is None else random.permutation(size)
            own = own[longest_first(everything[own], ties)]
            self._parts.append((own, count))
            passes, rest = divmod(count, size)
            teeth = np.arange(rest) * size // max(rest, 1)
            bounds += [np.tile(everything[own], passes), everything[own[teeth]]]
            begin += size
        self.bounds = np.concatenate(bounds)
        self.rates = np.repeat([n / size for n, size in zip(self.counts, sizes, strict=True)], sizes)
        """How often an epoch uses each example, on average."""

    def epoch(self, number: int) -> IntArray:
        """Indices of the examples of an epoch, part after part."""
        chosen = []
        for own, count in self._parts:
            passes, rest = divmod(count, len(own))
            comb = (np.arange(len(own)) + number) * rest % len(own) < rest
            chosen += [np.tile(own, passes), own[comb]]
        return np.concatenate(chosen)
