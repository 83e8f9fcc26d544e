"""What a GPU would refuse is refused here: devices are never mixed, and a step waits for the device once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.optim import SGD

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_pretrained
from tests.gradients import QUIET
from tests.second_device import counted_waits, on_second, second_device

ROWS = [{"prompt": f"What is {i} and {i}?", "completion": f"It is {i + i}, I think."} for i in range(24)]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_pretrained(tmp_path_factory.mktemp("second"))


def fit(pretrained: str, trainer: dict[str, Any], **model: Any) -> tuple[SFTModule, Trainer]:
    torch.manual_seed(0)
    module = SFTModule(pretrained, optimizer=lambda groups: SGD(groups, lr=0.1), **model)
    data = SFTDataModule(train=ROWS, val=ROWS[:6], tokens_per_batch=128, cache=None)
    own = Trainer(**QUIET | {"max_epochs": 1, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0} | trainer)
    own.fit(module, data)
    return module, own


def test_the_second_device_is_as_strict_as_a_gpu() -> None:
    with second_device() as device:
        here = torch.zeros(3, device=device)
        with pytest.raises(RuntimeError, match="same device"):
            here + torch.zeros(3)
        with torch.device(device), pytest.raises(RuntimeError, match="generator"):
            torch.randint(5, (3,), generator=torch.Generator())
        with torch.device(device):
            assert torch.arange(3).device == torch.tensor([1.0]).device == device
        with counted_waits() as waits:
            assert (here + 1).sum().item() == 3
            assert here[here > 0].cpu().tolist() == []
        assert sum(waits.values()) == 3  # the sum, the boolean index, the copy


def test_a_fit_on_a_second_device_is_that_on_the_cpu(pretrained: str) -> None:
    expected, on_cpu = fit(pretrained, {"accelerator": "cpu"})
    with second_device() as device:
        module, trainer = fit(pretrained, on_second())
        assert module.attention is not None
        assert module.attention.name == "per_document", module.attention.why
        assert {p.device for p in module.parameters()} == {device}
        found = {name: value.cpu() for name, value in module.state_dict().items()}
    torch.testing.assert_close(found, expected.state_dict(), rtol=1e-5, atol=1e-6)
    for name in ("train/loss", "val/loss", "train/gradient_norm"):
        torch.testing.assert_close(trainer.callback_metrics[name].cpu(), on_cpu.callback_metrics[name])
