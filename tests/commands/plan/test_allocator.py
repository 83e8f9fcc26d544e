"""What the C library takes for a sequence of allocations."""

from __future__ import annotations

import os
import sys

import pytest

from lightning_sft.commands.plan.allocator import footprint

MIB = 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc says what it holds")


def in_mib(*events: tuple[int, int]) -> int:
    held = footprint(events)
    assert held is not None
    return round(held / MIB)


def test_what_is_freed_is_used_again() -> None:
    assert in_mib((0, 64 * MIB), (0, -1), (1, 64 * MIB)) == 64
    assert in_mib((0, 64 * MIB), (1, 64 * MIB)) == 128


def test_holes_between_blocks_that_stay_are_counted() -> None:
    num_blocks, size = 1000, 100_000  # too small to be mapped each by itself
    alternate = [(number, size) for number in range(num_blocks)]
    alternate += [(number, -1) for number in range(0, num_blocks, 2)]
    larger = [(num_blocks + number, 2 * size) for number in range(num_blocks // 4)]  # fit into none of the holes
    in_use = num_blocks * size / MIB  # before and after
    assert in_mib(*alternate, *larger) == pytest.approx(1.5 * in_use, rel=0.02)


def test_no_memory_is_touched() -> None:
    num_blocks = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (1 << 30)
    assert in_mib(*((number, 1 << 30) for number in range(num_blocks))) == 1024 * num_blocks  # twice what there is
