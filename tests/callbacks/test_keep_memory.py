"""Freed memory stays with the process, which the kernel's page faults of a process show."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_sft.callbacks import KeepMemory, keep_memory
from lightning_sft.callbacks.defaults import default_callbacks
from lightning_sft.commands.plan.layout import Layout
from lightning_sft.machine.allocators import KEEPS

FAULTS = """
import resource, sys
from types import SimpleNamespace
import torch
from lightning_sft.callbacks import KeepMemory
trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), callbacks=[])
KeepMemory(enabled=sys.argv[1] == "True").setup(trainer, None, "fit")
for step in range(20):
    if step == 15:  # the heap has grown to what it needs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(1 << 24)  # 64 MiB, which are freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(enabled: bool, **variables: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", FAULTS, str(enabled)]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other allocators")
def test_pages_are_not_taken_from_the_system_again_and_again() -> None:
    pages = 5 * (1 << 26) // os.sysconf("SC_PAGE_SIZE")
    kept, handed_back = faults(True), faults(False)
    assert handed_back > 50 * max(kept, 1)
    assert kept < pages / 100
    assert faults(True, MALLOC_MMAP_MAX_="1000") > 50 * max(kept, 1)  # the user's own setting holds


def trainer(device: str) -> Any:
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), callbacks=[])


@pytest.mark.parametrize(
    ("device", "stage", "enabled", "does"),
    [("cpu", "fit", True, 1), ("cpu", "validate", True, 0), ("cuda", "fit", True, 0), ("cpu", "fit", False, 0)],
)
def test_it_is_for_fits_on_cpus(
    monkeypatch: pytest.MonkeyPatch, device: str, stage: str, enabled: bool, does: int
) -> None:
    called: list[bool] = []
    monkeypatch.setattr(keep_memory, "keep_freed_memory", lambda: called.append(True))
    KeepMemory(enabled).setup(trainer(device), None, stage)
    assert len(called) == does


def test_the_command_line_adds_it_to_fit_unless_it_is_there() -> None:
    def added(settings: dict[str, Any], **other: bool) -> int:
        return sum(isinstance(callback, KeepMemory) for callback in default_callbacks(settings, False, **other))

    assert added({}) == added({"fast_dev_run": True}) == added({"enable_checkpointing": False}) == 1
    assert added({"callbacks": [KeepMemory(False)]}) == 0
    assert added({}, is_fit=False) == 0


def test_plan_counts_with_what_fit_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    off = {"class_path": "lightning_sft.callbacks.KeepMemory", "init_args": {"enabled": False}}

    def settings(callbacks: Any) -> Any:
        return Layout.of(SimpleNamespace(precision="32-true", strategy="auto", callbacks=callbacks), 1).mallopt

    assert settings(None) == KEEPS
    assert settings([off]) == {}
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert settings(None) == {}
