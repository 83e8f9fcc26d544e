from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.data.packing import group, pack

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


@given(LENGTHS, st.integers(50, 200))
def test_groups_are_a_partition_within_the_padded_capacity(lengths: list[int], capacity: int) -> None:
    groups = group(lengths, capacity)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    assert all(max(lengths[i] for i in g) * len(g) <= capacity for g in groups)


@pytest.mark.parametrize("partition", [pack, group])
def test_a_sequence_longer_than_the_capacity_is_refused(partition: object) -> None:
    with pytest.raises(ValueError, match="11 tokens, more than the capacity of 10"):
        partition([3, 11], 10)


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
