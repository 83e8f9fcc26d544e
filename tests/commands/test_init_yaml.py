"""The machine decides on devices and precision."""

from __future__ import annotations

import pytest
import torch

from lightning_sft.commands import init_yaml as start_yaml
from lightning_sft.commands.init_yaml import Machine
from lightning_sft.types import InputError


@pytest.mark.parametrize(("is_slow", "precision"), [(True, "32-true"), (False, "bf16-mixed")])
def test_a_processor_that_is_slow_in_bfloat16_gets_float32(
    monkeypatch: pytest.MonkeyPatch, is_slow: bool, precision: str
) -> None:
    monkeypatch.setattr(start_yaml, "bfloat16_is_slow", lambda: is_slow)
    machine = Machine.here()
    assert (machine.accelerator, machine.devices, machine.precision) == ("cpu", 1, precision)


@pytest.mark.parametrize(("capability", "precision"), [((9, 0), "bf16-mixed"), ((7, 5), "16-mixed")])
def test_gpus_are_all_used_in_what_they_are_fast_in(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    machine = Machine.here()
    assert (machine.accelerator, machine.devices, machine.precision) == ("gpu", 4, precision)
    assert Machine.here(2).devices == 2


def test_no_devices_are_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        Machine.here(0)
