"""Lengths to packs: which sequences share a micro-batch. Integers only."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: put each sequence, longest first, into the first pack that has room.

    A segment tree over the room of each pack finds the first fit in O(log n), so a million lengths take seconds.

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
    if max(lengths, default=0) > capacity:
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        raise ValueError(f"Sequence {longest} has {lengths[longest]} tokens, more than the capacity of {capacity}.")
    leaves = 1
    while leaves < len(lengths):
        leaves *= 2
    room = [capacity] * (2 * leaves)  # room[i] is the most room of a pack below node i; packs not yet begun are empty
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length, node = lengths[index], 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        if node - leaves == len(packs):
            packs.append([])
        packs[node - leaves].append(index)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return packs


def group(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Sequences of like length, so that each group padded to its longest has at most ``capacity`` positions.

    >>> group([3, 6, 2, 5, 4], capacity=12)
    [[1, 3], [4, 0, 2]]
    """
    pack(lengths[:0] if len(lengths) == 0 else [max(lengths)], capacity)  # the same refusal of what can never fit
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= capacity:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
