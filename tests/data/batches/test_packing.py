from __future__ import annotations

import random
import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_sft.data.batches.packing import group, pack

LENGTHS = st.lists(st.integers(1, 50), max_size=80)


@given(LENGTHS, st.integers(50, 200))
def test_packs_are_a_partition_within_the_capacity(lengths: list[int], capacity: int) -> None:
    packs = pack(lengths, capacity)
    assert sorted(i for p in packs for i in p) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in p) <= capacity for p in packs)


@given(LENGTHS, st.integers(50, 200))
def test_packing_is_hardly_ever_worse_than_first_fit_decreasing(lengths: list[int], capacity: int) -> None:
    room: list[int] = []
    for length in sorted(lengths, reverse=True):  # first fit by its definition
        fits = [number for number, r in enumerate(room) if r >= length]
        if fits:
            room[fits[0]] -= length
        else:
            room.append(capacity - length)
    assert len(pack(lengths, capacity)) <= len(room) + 1


def by_definition(lengths: list[int], capacity: int) -> list[list[int]]:
    """Lengths of each pack: the longest that fits, or of the pair that fits best the longer, while it fits better."""
    left, packs = sorted(lengths, reverse=True), []
    while left:
        pack_of, room = [left.pop(0)], capacity
        while True:
            room -= pack_of[-1]
            fitting = [length for length in left if length <= room]
            if not fitting:
                break
            best = fitting[0]
            pairs = [(a, b) for i, a in enumerate(fitting) for b in fitting[i + 1 :] if a + b <= room]
            a, b = max(pairs, key=lambda pair: (sum(pair), pair[0]), default=(0, 0))
            if a + b > best:
                best = a
            left.remove(best)
            pack_of.append(best)
        packs.append(pack_of)
    return packs


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(50, 200))
@example([40, 30, 20, 15, 15], 70)  # 30 would fill the room best of all, two of 15 as well
@example([40, 20, 15, 15], 70)  # two of 15 fill the room, 20 does not
@example([40, 16, 15, 9, 6], 70)  # only one 15 is there
@example([45, 20, 12, 8], 70)  # 12 and 8 fill no more than 20
def test_the_last_sequences_of_a_pack_are_chosen_in_pairs(lengths: list[int], capacity: int) -> None:
    packs = [[lengths[i] for i in pack_of] for pack_of in pack(lengths, capacity)]
    assert packs == by_definition(lengths, capacity)


def packed_at_first(lengths: list[int], capacity: int) -> list[list[int]]:
    """The same packs in O(capacity) a choice, as they were once made: a run that began with them has to resume."""
    left = np.bincount(np.asarray(lengths, dtype=np.int64))
    of_length: dict[int, list[int]] = {}
    for index in range(len(lengths) - 1, -1, -1):
        of_length.setdefault(lengths[index], []).append(index)
    packs: list[list[int]] = []
    while left.any():
        trial, room, chosen = left.copy(), capacity, list[int]()
        while True:
            fits = np.maximum.accumulate(np.where(trial > 0, np.arange(len(trial)), 0))
            longest = len(trial) - 1
            if not (best := int(fits[min(room, longest)])):
                break
            if chosen and best < room <= 2 * fits[-1]:
                first = np.flatnonzero(trial[:room])
                second = fits[np.minimum(room - first, longest)]
                second = np.where((second == first) & (trial[first] < 2), fits[np.maximum(second - 1, 0)], second)
                pair = int((first + second).argmax())
                if first[pair] + second[pair] > best:
                    best = int(max(first[pair], second[pair]))
            chosen.append(best)
            trial[best] -= 1
            room -= best
        used, times = np.unique(chosen, return_counts=True)
        repeats = int((left[used] // times).min())
        left[used] -= repeats * times
        packs += [[of_length[length].pop() for length in chosen] for _ in range(repeats)]
    return packs


@st.composite
def distributions(draw: st.DrawFn) -> tuple[list[int], int]:
    """Lengths as data have them, and such as are hard to pack: multiples, clusters, few of many; and a capacity."""
    random, size = np.random.default_rng(draw(st.integers(0, 2**32))), draw(st.integers(0, 300))
    longest = draw(st.integers(1, 3000))
    step = draw(st.sampled_from([1, 2, 7, 64]))
    shape = draw(st.sampled_from(["uniform", "zipf", "clusters", "few"]))
    if shape == "zipf":
        lengths = np.minimum(random.zipf(1.3, size), longest)
    elif shape == "clusters":
        lengths = np.where(
            random.random(size) < 0.5, random.integers(1, 12, size), longest - random.integers(0, 9, size)
        )
    elif shape == "few":
        lengths = random.choice(random.integers(1, longest + 1, 4), size)
    else:
        lengths = random.integers(1, longest + 1, size)
    lengths = np.maximum(lengths // step * step + draw(st.integers(0, 3)), 1)
    return lengths.tolist(), max(lengths.tolist(), default=1) + draw(st.integers(0, 4000))


@given(distributions())
@example(([500, 300, 250, 120, 120], 1000))  # the best pair is far below the room, and 120 is there twice
@example(([500, 300, 130, 120, 1], 780))  # and so is a lone sequence
def test_packs_are_those_of_the_first_algorithm(given: tuple[list[int], int]) -> None:
    assert pack(*given) == packed_at_first(*given)


@given(LENGTHS, st.integers(50, 200))
def test_groups_are_a_partition_within_the_padded_capacity(lengths: list[int], capacity: int) -> None:
    groups = group(lengths, capacity)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    assert all(max(lengths[i] for i in g) * len(g) <= capacity for g in groups)


@pytest.mark.parametrize("partition", [pack, group])
def test_a_sequence_longer_than_the_capacity_is_refused(partition: object) -> None:
    with pytest.raises(ValueError, match="11 tokens, more than the capacity of 10"):
        partition([3, 11], 10)


@pytest.mark.parametrize("partition", [pack, group])
def test_an_empty_sequence_is_refused(partition: object) -> None:
    with pytest.raises(ValueError, match="Sequence 1 has no tokens"):
        partition([3, 0], 10)


def test_a_choice_costs_the_same_at_any_capacity() -> None:
    drawn = random.Random(0)
    lengths = [drawn.randrange(1, 131_072) for _ in range(10_000)]  # each of another length: a choice for each
    begin = time.perf_counter()
    pack(lengths, 131_072)
    assert time.perf_counter() - begin < 5  # 0.2 s; 7 to 25 s in O(capacity) a choice


def test_the_cost_grows_hardly_faster_than_the_number_of_sequences() -> None:
    drawn = random.Random(0)
    seconds = []
    for size in (2_000, 32_000):
        lengths = [drawn.randrange(10, 600) for _ in range(size)]
        begin = time.perf_counter()
        pack(lengths, 2048)
        seconds.append(time.perf_counter() - begin)
    assert seconds[1] / seconds[0] < 16 * 6  # a quadratic one takes 256 times as long


def test_packs_of_many_sequences_are_nearly_full() -> None:
    drawn = random.Random(0)
    lengths = [drawn.randrange(60, 500) for _ in range(5_000)]
    assert sum(lengths) / (len(pack(lengths, 2048)) * 2048) > 0.995
