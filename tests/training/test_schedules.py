from __future__ import annotations

import math
from itertools import pairwise

import pytest

from lightning_sft.training.schedules import Schedule, learning_rate_factor


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_it_rises_to_1_and_falls_to_0_without_jumping_back_up(schedule: Schedule) -> None:
    factors = [learning_rate_factor(step, 100, schedule, warmup=0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[100] == 0.0
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert factors[99] > 0  # the last step still learns


def test_the_default_is_a_cosine_after_three_percent_of_the_steps() -> None:
    """SGDR (Loshchilov and Hutter, 2017), equation 5, without restarts: ½ (1 + cos(π · progress))."""
    factors = [learning_rate_factor(step, 1000) for step in range(30, 1001)]
    assert factors == pytest.approx([0.5 * (1 + math.cos(math.pi * done / 970)) for done in range(971)], abs=1e-12)
    assert [learning_rate_factor(step, 1000) for step in range(30)] == pytest.approx([(i + 1) / 30 for i in range(30)])


def test_linear_is_a_straight_line() -> None:
    factors = [learning_rate_factor(step, 110, "linear", warmup=1 / 11) for step in range(10, 111)]
    assert factors == pytest.approx([1 - done / 100 for done in range(101)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_beyond_the_last_step_it_stays_at_0(schedule: Schedule) -> None:
    assert [learning_rate_factor(step, 10, schedule) for step in (10, 11, 25)] == [0.0] * 3
    assert learning_rate_factor(10, 10, schedule, warmup=1.0) == 0.0  # nothing is left to fall over


def test_wsd_is_flat_until_the_last_fifth() -> None:
    assert {learning_rate_factor(step, 100, "wsd", warmup=0.1) for step in range(10, 81)} == {1.0}
    assert learning_rate_factor(90, 100, "wsd", warmup=0.1) == pytest.approx(0.5)


def test_constant_stays() -> None:
    assert {learning_rate_factor(step, 10, "constant", warmup=0.0) for step in range(30)} == {1.0}


def test_a_single_step_is_taken_at_a_full_rate() -> None:
    assert learning_rate_factor(0, 1, "cosine", warmup=0.03) == 1.0
    assert learning_rate_factor(0, 1, "cosine", warmup=0.0) == 1.0
