"""Lengths to packs: which sequences share a micro-batch. Integers only."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: put each sequence, longest first, into the pack where it leaves the least room.

    Sequences of equal length are placed together: the tightest packs take as many of them as fit. So the cost goes with
    the number of different lengths and of packs touched; a million sequences take a second or two.

    Args:
        lengths: Tokens of each sequence.
        capacity: Most tokens in a pack.

    Returns:
        Packs of indices into ``lengths``; together they hold every index once.

    Raises:
        ValueError: When a sequence is longer than the capacity.

    >>> pack([3, 6, 2, 5, 4], capacity=8)
    [[1, 2], [3, 0], [4]]
    """
    _check(lengths, capacity)
    descending = -np.sort(-np.asarray(lengths, dtype=np.int64))
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    run_ends = np.searchsorted(-descending, -descending, side="right").tolist()  # where sequences of this length end
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room -> numbers of the packs that have it
    rooms: list[int] = []  # the keys of with_room, ascending
    begin = 0
    while begin < len(order):
        length = max(1, lengths[order[begin]])
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        else:
            room, number = capacity, len(packs)
            packs.append([])
        end = min(begin + room // length, run_ends[begin])
        packs[number] += order[begin:end]
        left = room - (end - begin) * length
        if left not in with_room:
            with_room[left] = []
            insort(rooms, left)
        with_room[left].append(number)
        begin = end
    return packs


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


def _check(lengths: Sequence[int], capacity: int) -> None:
    if max(lengths, default=0) > capacity:
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        raise ValueError(f"Sequence {longest} has {lengths[longest]} tokens, more than the capacity of {capacity}.")
