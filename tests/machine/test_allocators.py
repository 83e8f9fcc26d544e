"""The command line asks torch's CUDA allocator for expandable segments, and leaves alone what a user has set."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from lightning_sft import main as command
from lightning_sft.machine.allocators import expand_segments

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As on Linux with a build of torch for CUDA, and a user who has set nothing."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(sys, "platform", "linux")
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(("version", "name"), [("2.8.0", NAMES[1]), ("2.9.1+cu130", NAMES[0]), ("2.14.0", NAMES[0])])
def test_the_variable_is_the_one_that_this_torch_reads(cuda: pytest.MonkeyPatch, version: str, name: str) -> None:
    cuda.setattr(torch, "__version__", TorchVersion(version))
    environment: dict[str, str] = {}
    assert expand_segments(environment)
    assert environment == {name: "expandable_segments:True"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["max_split_size_mb:512", "expandable_segments:False", ""])
def test_what_a_user_has_set_stays(cuda: pytest.MonkeyPatch, name: str, value: str) -> None:
    environment = {name: value}
    assert not expand_segments(environment)
    assert environment == {name: value}


@pytest.mark.parametrize(("target", "attribute", "value"), [(torch.version, "cuda", None), (sys, "platform", "win32")])
def test_other_systems_and_builds_are_left_alone(
    cuda: pytest.MonkeyPatch, target: Any, attribute: str, value: Any
) -> None:
    cuda.setattr(target, attribute, value)
    environment: dict[str, str] = {}
    assert not expand_segments(environment)
    assert not environment


@pytest.mark.parametrize(("verb", "is_set"), [("fit", True), ("show", False), ("--version", False)])
def test_only_fit_on_the_command_line_asks(cuda: pytest.MonkeyPatch, verb: str, is_set: bool) -> None:
    seen = []
    cuda.setattr(sys, "argv", ["lightning-sft", verb])
    cuda.setattr(command, "main", lambda: seen.append(any(name in os.environ for name in NAMES)))
    cuda.setattr(os, "environ", dict(os.environ))
    command.console()
    assert seen == [is_set]
    assert not torch.cuda.is_initialized()
