from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.data.batches.packing import pack
from lightning_sft.data.batches.plan import Division, EpochPlan, MicroBatch
from lightning_sft.data.batches.sampling import EpochSampler

CASES = given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    num_ranks=st.integers(1, 4),
    accumulate=st.integers(1, 4),
    epoch=st.integers(0, 3),
)


def make(lengths: list[int], num_ranks: int = 1, accumulate: int = 1, **settings: object) -> EpochPlan:
    weights = [length / 2 for length in lengths]
    return EpochPlan(
        lengths, weights, partial(pack, capacity=64), num_ranks=num_ranks, accumulate=accumulate, **settings
    )


def steps(plan: EpochPlan, epoch: int) -> list[list[MicroBatch]]:
    columns = [plan.micro_batches(epoch, rank) for rank in range(plan.num_ranks)]
    a = plan.accumulate
    return [[m for column in columns for m in column[i : i + a]] for i in range(0, len(columns[0]), a)]


@CASES
def test_every_example_is_used_once_an_epoch(lengths: list[int], num_ranks: int, accumulate: int, epoch: int) -> None:
    plan = make(lengths, num_ranks, accumulate)
    used = [i for step in steps(plan, epoch) for micro in step for i in micro.examples]
    assert sorted(used) == list(range(len(lengths)))


@CASES
def test_ranks_get_equally_many_micro_batches_a_multiple_of_accumulate(
    lengths: list[int], num_ranks: int, accumulate: int, epoch: int
) -> None:
    plan = make(lengths, num_ranks, accumulate)
    counts = {len(plan.micro_batches(epoch, rank)) for rank in range(num_ranks)}
    assert counts == {plan.num_micro_batches}
    assert plan.num_micro_batches == plan.num_steps * accumulate


@CASES
def test_every_micro_batch_knows_the_weight_of_its_whole_step(
    lengths: list[int], num_ranks: int, accumulate: int, epoch: int
) -> None:
    for step in steps(make(lengths, num_ranks, accumulate), epoch):
        weight = sum(lengths[i] / 2 for micro in step for i in micro.examples)
        assert weight > 0
        assert {micro.normalizer for micro in step} == {weight}


@CASES
def test_steps_differ_by_one_pack_at_most(lengths: list[int], num_ranks: int, accumulate: int, epoch: int) -> None:
    sizes = [sum(bool(micro.examples) for micro in step) for step in steps(make(lengths, num_ranks, accumulate), epoch)]
    assert max(sizes) - min(sizes) <= 1


def test_the_same_global_batches_for_any_split_of_a_step_into_ranks_and_micro_batches() -> None:
    lengths = [1 + i * 7 % 40 for i in range(60)]
    splits = [make(lengths, r, a) for r, a in ((1, 4), (2, 2), (4, 1))]
    sets = [[sorted(i for m in step for i in m.examples) for step in steps(plan, epoch=1)] for plan in splits]
    assert sets[0] == sets[1] == sets[2]


def test_the_plan_is_a_function_of_seed_and_epoch_alone() -> None:
    lengths = [1 + i % 9 for i in range(40)]
    assert make(lengths).micro_batches(2, 0) == make(lengths).micro_batches(2, 0)
    assert make(lengths).micro_batches(2, 0) != make(lengths).micro_batches(3, 0)
    assert make(lengths, seed=1).micro_batches(2, 0) != make(lengths, seed=2).micro_batches(2, 0)


def test_examples_change_company_between_epochs() -> None:
    plan = make([10] * 60)
    company = [{frozenset(m.examples) for m in plan.micro_batches(epoch, 0)} for epoch in (0, 1)]
    assert company[0] != company[1]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
def test_a_limit_cuts_the_normalizer_of_the_step_that_it_cuts(limit: int) -> None:
    plan = make([60] * 8, accumulate=3, limit=limit)
    used = plan.micro_batches(0, 0)[:limit]
    for begin in range(0, limit, 3):
        window = used[begin : begin + 3]
        assert {m.normalizer for m in window} == {sum(30.0 for m in window for _ in m.examples)}
    assert plan.num_steps == -(-limit // 3)


def test_a_share_limits_as_that_number_of_micro_batches_does() -> None:
    half = make([60] * 8, accumulate=3, limit=0.5)
    assert half.micro_batches(0, 0) == make([60] * 8, accumulate=3, limit=4).micro_batches(0, 0)
    assert half.num_steps == 2


def test_a_constant_normalizer_is_the_mean_weight_of_a_step() -> None:
    assert {m.normalizer for m in make([60] * 7, accumulate=2, constant=True).micro_batches(0, 0)} == {7 * 30 / 4}


def test_a_constant_normalizer_counts_examples_as_often_as_an_epoch_of_a_mixture_uses_them() -> None:
    draw = EpochSampler([60] * 8, sizes=[4, 4], repeats=[0.5, 2.0], seed=0)
    plan = make([60] * 8, accumulate=2, constant=True, draw=draw)
    assert {m.normalizer for m in plan.micro_batches(0, 0)} == {30 * (2 + 8) / 5}


def test_the_fingerprint_changes_with_all_that_changes_a_step_and_not_with_how_ranks_share_it() -> None:
    lengths = [60] * 8
    one = make(lengths, accumulate=4).fingerprint
    assert "8 sequences" in one
    assert "in 8 micro-batches, 8 of 8 used, data.seed=0" in one
    assert make(lengths, num_ranks=2, accumulate=2).fingerprint == make(lengths, num_ranks=4).fingerprint == one
    assert "4 of 8 used" in make(lengths, num_ranks=2, accumulate=2, limit=2).fingerprint
    others = [
        make([60] * 7 + [61], accumulate=4),
        make([60] * 4 + [64, 60, 60, 60], accumulate=4),
        make(lengths, accumulate=4, seed=1),
        make(lengths, accumulate=4, limit=4),
        make(lengths, accumulate=4, draw=EpochSampler(lengths, [4, 4], [2.0, 0.5], 0)),
        make(lengths, accumulate=4, draw=EpochSampler(lengths, [4, 4], [0.5, 2.0], 0)),
    ]
    assert len({one, *(plan.fingerprint for plan in others)}) == 7


def test_the_defaults_are_one_rank_all_micro_batches_and_the_seed_0() -> None:
    lengths = [60, 50, 40, 30]
    plan = EpochPlan(lengths, [1.0] * 4, partial(pack, capacity=64))
    assert plan.fingerprint == make(lengths, 1, limit=4, seed=0).fingerprint


def test_a_constant_normalizer_counts_each_example_as_often_as_an_epoch_uses_it() -> None:
    lengths, weights = [2] * 8, [1.0] * 4 + [3.0] * 4
    draw = EpochSampler(lengths, [4, 4], [2.0, 0.5], seed=0)  # 2 * 4 * 1 + 0.5 * 4 * 3 = 14 an epoch
    plan = EpochPlan(lengths, weights, partial(pack, capacity=4), draw=draw, constant=True)
    normalizers = {micro.normalizer for micro in plan.micro_batches(epoch=0, rank=0)}
    assert normalizers == {14 / plan.num_steps}


def test_by_default_one_process_takes_all_of_an_epoch_in_steps_of_one_micro_batch() -> None:
    assert Division() == Division(rank=0, num_ranks=1, accumulate=1, limit=1.0, num_local=1)
    plan = EpochPlan([2] * 8, [1.0] * 8, partial(pack, capacity=4))
    assert len(plan.micro_batches(epoch=0, rank=0)) == len(plan.packs) == plan.num_steps == 4
    one, same = MicroBatch((0,), 1.0, 1.0), MicroBatch((0,), 1.0, 1.0)
    assert len({one, same, Division(), Division()}) == 2  # values, not places
