"""Lengths to packs: which sequences share a micro-batch. Integers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
Packing = Literal["packed", "padded"]
"""Sequences end to end without padding, or each in a separate row."""

_SUMS = 16  # sums of two lengths that are looked for one by one: of many lengths, two nearly always fill the room


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
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

    >>> pack([3, 6, 2, 5, 4], capacity=8)
    [[1, 2], [3, 0], [4]]
    """
    _check(lengths, capacity)
    left = _Lengths(lengths)
    of_length: dict[int, list[int]] = {}  # their indices, the first last
    for index in range(len(lengths) - 1, -1, -1):
        of_length.setdefault(lengths[index], []).append(index)
    packs: list[list[int]] = []
    while chosen := _fill(left, capacity):
        used = Counter(chosen)
        repeats = min(int(left.count[length] // times) for length, times in used.items())
        for length, times in used.items():
            left.take(length, repeats * times)
        packs += [[of_length[length].pop() for length in chosen] for _ in range(1 + repeats)]
    return packs


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

    def __init__(self, lengths: Sequence[int]) -> None:
        self.count: IntArray = np.bincount(np.asarray(lengths, dtype=np.int64), minlength=1)
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


def group(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Sequences of like length, so that each group padded to its longest has at most ``capacity`` positions.

    >>> group([3, 6, 2, 5, 4], capacity=12)
    [[1, 3], [4, 0, 2]]
    """
    _check(lengths, capacity)
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= capacity:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


PARTITIONS: dict[Packing, Callable[[Sequence[int], int], list[list[int]]]] = {"packed": pack, "padded": group}
"""How micro-batches are filled."""


def _check(lengths: Sequence[int], capacity: int) -> None:
    if max(lengths, default=0) > capacity:
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        raise ValueError(f"Sequence {longest} has {lengths[longest]} tokens, more than the capacity of {capacity}.")
    if min(lengths, default=1) < 1:
        raise ValueError(f"Sequence {min(range(len(lengths)), key=lengths.__getitem__)} has no tokens.")
