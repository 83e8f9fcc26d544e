"""What a device has for a process."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from lightning_sft.commands.plan.device import GIB, Device, _limits_of_container, resident


def test_processes_share_the_memory_of_a_machine() -> None:
    assert Device.of("cpu", 4, memory=8).capacity == 2 * GIB
    assert Device.of("gpu", 4, memory=8).capacity == 8 * GIB


def test_a_process_begins_as_this_one_is() -> None:
    before = resident()
    # not torch's: that may have freed memory at hand
    held = mmap.mmap(-1, 1 << 28, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    torch.frombuffer(held, dtype=torch.uint8).fill_(1)
    assert Device.of("cpu", 1).base - before == pytest.approx(len(held), rel=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here, its memory is known")
def test_nobody_knows_what_a_gpu_has_that_is_not_here() -> None:
    assert Device.of("gpu", 1).capacity is None
    assert Device.of("auto", 1).name == "CPU"


def test_a_container_may_have_less_than_its_machine(tmp_path: Path) -> None:
    assert min(_limits_of_container(tmp_path)) == float("inf")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert min(_limits_of_container(tmp_path)) == float("inf")
    (tmp_path / "memory.max").write_text("5000\n")
    assert min(_limits_of_container(tmp_path)) == 4000
