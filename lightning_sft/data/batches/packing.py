"""Lengths to packs: which sequences share a micro-batch. Integers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
Packing = Literal["packed", "padded"]
"""Sequences end to end without padding, or each in a separate row."""

_SUMS = 16  # sums of two lengths that are looked for one by one: of many lengths, two nearly always fill the room


class Packs(Sequence[IntArray]):
    """Indices of the sequences of each pack, laid end to end: eight bytes a sequence.

    Args:
        indices: Indices of the sequences of all packs.
        bounds: Where each pack begins, and where the last one ends.

    >>> packs = Packs.of([[1, 2], [], [0]])
    >>> packs[0].tolist(), packs[1:].tolist(), packs.take(np.array([2, 0])).tolist()
    ([1, 2], [[], [0]], [[0], [1, 2]])
    """

    def __init__(self, indices: IntArray, bounds: IntArray) -> None:
        self.indices, self.bounds = indices, bounds

    @classmethod
    def of(cls, packs: Packs | Sequence[Sequence[int]]) -> Packs:
        """Packs from lists; packs are returned as they are."""
        if isinstance(packs, Packs):
            return packs
        return cls.of_sizes(np.array([i for pack in packs for i in pack], np.int64), list(map(len, packs)))

    @classmethod
    def of_sizes(cls, indices: IntArray, sizes: Sequence[int] | IntArray) -> Packs:
        """Packs of so many sequences each."""
        return cls(indices, np.append(0, np.cumsum(sizes, dtype=np.int64)))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, number: int) -> IntArray: ...
    @overload
    def __getitem__(self, number: slice) -> Packs: ...
    def __getitem__(self, number: int | slice) -> IntArray | Packs:
        if isinstance(number, slice):
            return self.take(np.arange(len(self))[number])
        number = range(len(self))[number]
        return self.indices[self.bounds[number] : self.bounds[number + 1]]

    def take(self, numbers: IntArray) -> Packs:
        """The packs with these numbers, in this order; -1 is an empty one."""
        begins, sizes = self.bounds[numbers], np.where(numbers < 0, 0, self.sizes[numbers])
        taken = Packs.of_sizes(self.indices, sizes)
        places = np.arange(taken.bounds[-1]) + np.repeat(begins - taken.bounds[:-1], sizes)
        return Packs(self.indices[places], taken.bounds)

    @property
    def sizes(self) -> IntArray:
        """Number of sequences of each pack."""
        return np.diff(self.bounds)

    def tolist(self) -> list[list[int]]:
        """Lists of indices."""
        return [pack.tolist() for pack in self]


def pack(lengths: Sequence[int] | IntArray, capacity: int) -> list[list[int]]:
    """``packed`` as lists.

    >>> pack([3, 6, 2, 5, 4], capacity=8)
    [[1, 2], [3, 0], [4]]
    """
    return packed(lengths, capacity).tolist()


def packed(lengths: Sequence[int] | IntArray, capacity: int) -> Packs:
    """Longest first, each pack filled to the brim: its last sequences are chosen two at a time.

    Only how many sequences there are of each length matters, so a way to fill a pack is worked out once and used as
    often as the lengths last: a million sequences take half a second.

    Args:
        lengths: Tokens of each sequence, at least 1.
        capacity: Maximum number of tokens in a pack.

    Returns:
        Packs of indices into ``lengths``; together they hold every index once.

    Raises:
        ValueError: When a sequence is longer than the capacity, or empty.
    """
    of_all = _checked(lengths, capacity)
    left = _Lengths(of_all)
    by_length = np.argsort(of_all, kind="stable")  # indices of the shortest first, those of equal length in order
    following = np.append(0, np.cumsum(left.count)).tolist()  # by length: place in by_length of the next index
    blocks, sizes, counts = [np.zeros(0, np.int64)], list[int](), list[int]()
    while chosen := _fill(left, capacity):
        used = Counter(chosen)
        repeats = min(int(left.count[length] // times) for length, times in used.items())
        block = np.empty((1 + repeats, len(chosen)), np.int64)
        for length, times in used.items():
            left.take(length, repeats * times)
            begin, following[length] = following[length], following[length] + block.shape[0] * times
            columns = [place for place, other in enumerate(chosen) if other == length]
            block[:, columns] = by_length[begin : following[length]].reshape(-1, times)
        blocks.append(block.ravel())
        sizes.append(len(chosen))
        counts.append(len(block))
    return Packs.of_sizes(np.concatenate(blocks), np.repeat(np.array(sizes, np.int64), counts))


def _fill(left: _Lengths, room: int) -> list[int]:
    """Lengths for one pack, taken from those that are left: the longest, then what fills the room best.

    Args:
        left: Lengths of the remaining sequences.
        room: The capacity.
    """
    chosen: list[int] = []
    while best := left.longest(room):
        if chosen and best < room <= 2 * left.longest():
            best = left.longer_of_pair(room, best) or best
        chosen.append(best)
        left.take(best)
        room -= best
    return chosen


class _Lengths:
    """How many sequences are left of each length.

    Which lengths there are is also kept as the bits of two integers, bit n for the length n, and from the other end:
    what fits a room is then found in microseconds, however large the capacity is.

    Args:
        lengths: Tokens of each sequence, at least 1.
    """

    def __init__(self, lengths: IntArray) -> None:
        self.count: IntArray = np.bincount(lengths, minlength=1)
        self._most = len(self.count) - 1
        self._bits, self._mirrored = _as_bits(self.count > 0), _as_bits(self.count[::-1] > 0)

    def take(self, length: int, times: int = 1) -> None:
        """Take away so many sequences of a length."""
        if times:
            self.count[length] -= times
            if not self.count[length]:
                self._bits ^= 1 << length
                self._mirrored ^= 1 << (self._most - length)

    def longest(self, room: int | None = None) -> int:
        """The longest that fits the room, or of all; 0 if there is none."""
        bits = self._bits if room is None or room >= self._most else self._bits & ((2 << room) - 1)
        return max(bits.bit_length() - 1, 0)

    def longer_of_pair(self, room: int, best: int) -> int:
        """The longer one of the two sequences that fill the room best; the longest of several that do.

        Args:
            room: At most twice the longest length.
            best: The longest that fits the room; where no two are longer together, the result is 0.
        """
        most = min(room, 2 * best)
        for total in range(most, max(best, most - _SUMS), -1):
            shift = self._most - total  # bit n of the shifted mirror: whether there is the length total - n
            others = self._mirrored >> shift if shift >= 0 else self._mirrored << -shift
            longer = (self._bits & others).bit_length() - 1
            if longer > 0 and (2 * longer > total or self.count[longer] > 1):
                return longer
        return self._searched(room, best) if best < most - _SUMS else 0

    def _searched(self, room: int, best: int) -> int:
        """The same from all lengths that fit; where no two come near the room, there are few."""
        first = np.flatnonzero(self.count[: best + 1])
        shorter = np.append(0, first)
        second = shorter[np.searchsorted(first, room - first, side="right")]
        second = np.where((second == first) & (self.count[first] < 2), shorter[:-1], second)
        pair = int((first + second).argmax())
        return int(max(first[pair], second[pair])) if first[pair] + second[pair] > best else 0


def _as_bits(flags: NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


def group(lengths: Sequence[int] | IntArray, capacity: int) -> list[list[int]]:
    """``grouped`` as lists.

    >>> group([3, 6, 2, 5, 4], capacity=12)
    [[1, 3], [4, 0, 2]]
    """
    return grouped(lengths, capacity).tolist()


def grouped(lengths: Sequence[int] | IntArray, capacity: int) -> Packs:
    """Sequences of like length, so that each group padded to its longest has at most ``capacity`` positions."""
    of_all = _checked(lengths, capacity)
    order = np.argsort(-of_all, kind="stable")
    bounds, longest_first = [0], of_all[order]
    while bounds[-1] < len(order):
        bounds.append(min(len(order), bounds[-1] + capacity // int(longest_first[bounds[-1]])))
    return Packs(order, np.array(bounds))


PARTITIONS: dict[Packing, Callable[[Sequence[int] | IntArray, int], Packs]] = {"packed": packed, "padded": grouped}
"""How micro-batches are filled."""


def _checked(lengths: Sequence[int] | IntArray, capacity: int) -> IntArray:
    found = np.asarray(lengths, np.int64)
    if found.max(initial=0) > capacity:
        longest = int(found.argmax())
        raise ValueError(f"Sequence {longest} has {found[longest]} tokens, more than the capacity of {capacity}.")
    if found.min(initial=1) < 1:
        raise ValueError(f"Sequence {int(found.argmin())} has no tokens.")
    return found
