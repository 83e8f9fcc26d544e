"""An epoch of a mixture has its shares, all examples of a part are used equally often, and packs fit every epoch."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.data.batches.packing import pack
from lightning_sft.data.batches.plan import EpochPlan
from lightning_sft.data.batches.sampling import EpochSampler

PARTS = st.lists(
    st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.floats(0.05, 3.2)), min_size=1, max_size=3
)


def make(parts: list[tuple[list[int], float]], seed: int | None = 0) -> tuple[list[int], EpochSampler]:
    lengths = [length for own, _ in parts for length in own]
    return lengths, EpochSampler(lengths, [len(own) for own, _ in parts], [repeats for _, repeats in parts], seed)


@given(PARTS)
def test_no_example_is_ever_ahead_of_another_of_its_part_by_more_than_one_use(
    parts: list[tuple[list[int], float]],
) -> None:
    _, draw = make(parts)
    used: Counter[int] = Counter()
    for epoch in range(25):
        drawn = draw.epoch(epoch).tolist()
        used.update(drawn)
        begin = 0
        for (own, _), count in zip(parts, draw.counts, strict=True):
            of_part = [used[i] for i in range(begin, begin + len(own))]
            assert max(of_part) - min(of_part) <= 1
            assert sum(of_part) == count * (epoch + 1)
            begin += len(own)


@given(PARTS)
def test_whatever_an_epoch_draws_is_no_longer_than_the_bounds(parts: list[tuple[list[int], float]]) -> None:
    lengths, draw = make(parts)
    bounds = np.sort(draw.bounds)
    for epoch in range(9):
        assert (np.sort(np.asarray(lengths)[draw.epoch(epoch)]) <= bounds).all()


@given(PARTS)
def test_packs_fit_in_every_epoch_and_hold_what_was_drawn(parts: list[tuple[list[int], float]]) -> None:
    lengths, draw = make(parts)
    plan = EpochPlan(lengths, [1.0] * len(lengths), lambda x: pack(x, capacity=50), draw=draw, accumulate=2)
    for epoch in range(4):
        micro_batches = plan.micro_batches(epoch, 0)
        assert len(micro_batches) == plan.num_micro_batches
        assert all(sum(lengths[i] for i in micro.examples) <= 50 for micro in micro_batches)
        assert sorted(i for micro in micro_batches for i in micro.examples) == sorted(draw.epoch(epoch).tolist())


@given(PARTS)
def test_rates_are_how_often_examples_are_used(parts: list[tuple[list[int], float]]) -> None:
    lengths, draw = make(parts)
    cycle = int(np.lcm.reduce([len(own) for own, _ in parts]))
    used = np.bincount(np.concatenate([draw.epoch(epoch) for epoch in range(cycle)]), minlength=len(lengths))
    np.testing.assert_allclose(used / cycle, draw.rates)


def test_once_each_without_repeats_whatever_the_seed() -> None:
    for seed in (None, 0, 7):
        assert sorted(make([([3, 1, 2], 1.0), ([5], 1.0)], seed)[1].epoch(4).tolist()) == [0, 1, 2, 3]
