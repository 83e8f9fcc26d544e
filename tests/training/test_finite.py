"""A gradient that is not finite stops the fit before its weights are saved, and on a CPU before they are changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import SafeCheckpoint
from lightning_sft.training.finite import FiniteGradient
from tests.helpers.gradients import ROWS

Make = Callable[..., Trainer]


class ToATeacher(SFTModule):
    """The distance to a teacher that is equal at first: finite, but not its derivative."""

    def target_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        probabilities = logits.softmax(-1)
        apart = (probabilities - probabilities.detach()).square().sum(-1).sqrt()
        return functional.cross_entropy(logits, targets, reduction="none") + apart


def test_a_finite_loss_without_a_finite_gradient_changes_and_saves_nothing(
    pretrained: str, tmp_path: Path, quiet_trainer: Make
) -> None:
    module = ToATeacher(pretrained)
    module.configure_model()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    saves = SafeCheckpoint(tmp_path / "saved", every_n_train_steps=1)
    trainer = quiet_trainer(callbacks=[saves], enable_checkpointing=True)
    with pytest.raises(
        FloatingPointError, match=r"The gradient of step 1 is NaN or infinite, but its loss is not\. No"
    ):
        trainer.fit(module, SFTDataModule(train=ROWS[:6], tokens_per_batch=100))
    assert all(map(torch.equal, before, module.parameters()))
    assert not list(tmp_path.rglob("*.ckpt"))


def stub(**settings: Any) -> Any:
    return SimpleNamespace(**{"precision_plugin": None, "global_step": 6, "interrupted": False} | settings)


class OnADevice:
    """A norm that a device computes: the host waits where it is looked at, and not where it is sent with other sums."""

    device = torch.device("cuda")

    def __init__(self, value: float) -> None:
        self.value, self.is_waited_for = torch.tensor(value), False

    def detach(self) -> Tensor:
        return self.value

    def isfinite(self) -> Tensor:
        self.is_waited_for = True
        return self.value.isfinite()


def on_a_device(value: float) -> Any:
    """Stands for a tensor."""
    return OnADevice(value)


SUMS = torch.zeros(3, dtype=torch.float64)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_on_a_device_the_next_step_or_checkpoint_is_stopped(value: float) -> None:
    for look in (lambda own: own.arrived(own.kept(SUMS) * 2), lambda own: own.check(stub())):
        own = FiniteGradient()
        sound, bad = on_a_device(1.0), on_a_device(value)
        assert own.kept(SUMS).tolist() == [0.0]
        own.see(stub(global_step=5), sound)
        assert own.kept(SUMS).tolist() == [1.0]
        own.arrived(own.kept(SUMS))
        own.see(stub(), bad)
        assert own.kept(SUMS).dtype == SUMS.dtype
        assert not bad.is_waited_for
        with pytest.raises(FloatingPointError, match=r"gradient of step 7 .* The weights are lost, and have not been"):
            look(own)
        own.check(stub())  # said once


def test_another_error_is_not_hidden_and_a_scaler_leaves_out_steps_by_itself() -> None:
    own, bad = FiniteGradient(), on_a_device(float("nan"))
    own.see(stub(), bad)
    own.check(stub(interrupted=True))
    own = FiniteGradient()
    own.see(stub(precision_plugin=SimpleNamespace(scaler=object())), torch.tensor(float("inf")))
    own.see(stub(), None)
    own.check(stub())
