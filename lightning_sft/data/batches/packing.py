"""Lengths to packs: which sequences share a micro-batch. Integers only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
Packing = Literal["packed", "padded"]
"""Sequences end to end without padding, or each in a separate row."""


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Longest first, each pack filled to the brim: its last sequences are chosen two at a time.

    Only how many sequences there are of each length matters, so a way to fill a pack is worked out once and used as
    often as the lengths last: a million sequences take two seconds.

    Args:
        lengths: Tokens of each sequence, at least 1.
        capacity: Maximum number of tokens in a pack.

    Returns:
        Packs of indices into ``lengths``; together they hold every index once.

    Raises:
        ValueError: When a sequence is longer than the capacity.

    >>> pack([3, 6, 2, 5, 4], capacity=8)
    [[1, 2], [3, 0], [4]]
    """
    _check(lengths, capacity)
    left = np.bincount(np.asarray(lengths, dtype=np.int64))  # how many sequences there are of each length
    of_length: dict[int, list[int]] = {}  # their indices, the first last
    for index in range(len(lengths) - 1, -1, -1):
        of_length.setdefault(lengths[index], []).append(index)
    packs: list[list[int]] = []
    while left.any():
        chosen = _fill(left.copy(), capacity)
        used, times = np.unique(chosen, return_counts=True)
        repeats = int((left[used] // times).min())
        left[used] -= repeats * times
        packs += [[of_length[length].pop() for length in chosen] for _ in range(repeats)]
    return packs


def _fill(left: IntArray, room: int) -> list[int]:
    """Lengths for one pack: the longest that there is, then what fills the room best.

    Args:
        left: Number of remaining sequences of each length; decremented for those chosen.
        room: The capacity.
    """
    chosen: list[int] = []
    while True:
        fits = np.maximum.accumulate(np.where(left > 0, np.arange(len(left)), 0))  # the longest up to each length
        longest = len(left) - 1
        best = int(fits[min(room, longest)])
        if not best:
            return chosen
        if chosen and best < room <= 2 * fits[-1]:  # two could fill the room
            first = np.flatnonzero(left[:room])
            second = fits[np.minimum(room - first, longest)]
            second = np.where((second == first) & (left[first] < 2), fits[np.maximum(second - 1, 0)], second)
            pair = int((first + second).argmax())
            if first[pair] + second[pair] > best:
                best = int(max(first[pair], second[pair]))
        chosen.append(best)
        left[best] -= 1
        room -= best


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
