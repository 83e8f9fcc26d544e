"""What an optimizer's closure computes: the step, whole, each time it is called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.types import InputError
from tests.helpers.gradients import ROWS
from tests.helpers.own_steps import batches

Make = Callable[..., Trainer]


class Twice(SGD):
    """As SAM does: looks at the gradient a small step away."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        with_gradient = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        away = [0.05 * parameter.grad for parameter in with_gradient]
        with torch.no_grad():
            torch._foreach_add_(with_gradient, away)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            torch._foreach_sub_(with_gradient, away)
        super().step()
        return loss


class Logged(Callback):
    """What is logged, and what callbacks are given."""

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.found = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.loss = float(outputs.get("loss", 0.0))  # of a micro-batch that is left out there is none


def fitted(module: SFTModule, data: Any, make: Make, **settings: Any) -> Logged:
    logged = Logged()
    make(max_steps=1, callbacks=[logged], precision="64-true", **settings).fit(module, data)
    return logged


@pytest.mark.parametrize("own", [True, False])
def test_an_optimizer_that_evaluates_a_step_twice_logs_it_once(pretrained: str, quiet_trainer: Make, own: bool) -> None:
    of_kinds = []
    for kind in (SGD, Twice):
        data = (
            DataLoader(batches([9]), batch_size=None) if own else SFTDataModule(train=ROWS[:3], tokens_per_batch=2048)
        )
        module = SFTModule(pretrained, optimizer=partial(kind, lr=0.1))
        of_kinds.append((fitted(module, data, quiet_trainer), module))
    names = ("train/loss", "train/targets_seen", "train/gradient_norm")
    (plain, a), (twice, b) = of_kinds
    assert {name: plain.found[name] for name in names} == {name: twice.found[name] for name in names}
    assert any(not torch.equal(*pair) for pair in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("own", [True, False])
def test_one_that_would_see_the_last_micro_batch_alone_is_refused(
    pretrained: str, quiet_trainer: Make, own: bool
) -> None:
    data = (
        DataLoader(batches([9, 3, 5]), batch_size=None) if own else SFTDataModule(train=ROWS[:6], tokens_per_batch=100)
    )
    module = SFTModule(pretrained, optimizer=lambda groups: Twice(groups, lr=0.1))
    with pytest.raises(
        InputError, match=r"evaluates its closure more than once .*accumulate_grad_batches=4 the closure"
    ):
        fitted(module, data, quiet_trainer, accumulate_grad_batches=4)


class Skips(SFTModule):
    """Leaves out a micro-batch, as Lightning lets one do."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == self.skipped else loss

    skipped = 0


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # Lightning's own, on which the test acts
@pytest.mark.parametrize("skipped", [0, 1])
@pytest.mark.parametrize("own", [True, False])
def test_a_micro_batch_that_is_left_out_would_still_be_divided_by(
    pretrained: str, quiet_trainer: Make, own: bool, skipped: int
) -> None:
    data = DataLoader(batches([9, 3]), batch_size=None) if own else SFTDataModule(train=ROWS[:6], tokens_per_batch=100)
    module = Skips(pretrained)
    module.skipped = skipped
    with pytest.raises(InputError, match=r"training_step has returned None .* set their target_weights to 0"):
        fitted(module, data, quiet_trainer, accumulate_grad_batches=2)


class Pulled(SFTModule):
    """Pulls weights to 0 by hooks on their gradients."""

    def on_train_start(self) -> None:
        super().on_train_start()
        for parameter in self.parameters():
            parameter.register_hook(lambda gradient, of=parameter: gradient + of.detach())


def test_the_loss_of_own_batches_is_a_mean_where_one_is_a_step(pretrained: str, quiet_trainer: Make) -> None:
    def steps(kind: type[SFTModule]) -> tuple[Logged, list[Tensor]]:
        module = kind(pretrained, optimizer=lambda groups: SGD(groups, lr=1.0), schedule="constant", warmup=0.0)
        module.configure_model()
        before = [parameter.detach().double() for parameter in module.parameters()]
        logged = fitted(module, DataLoader(batches([9]), batch_size=None), quiet_trainer)
        return logged, [a - b.detach() for a, b in zip(before, module.parameters(), strict=True)]

    (logged, plain), (_, pulled) = steps(SFTModule), steps(Pulled)
    assert logged.loss == pytest.approx(logged.found["train/loss"], rel=1e-6)
    module = SFTModule(pretrained)
    module.configure_model()
    for own, other, parameter in zip(pulled, plain, module.parameters(), strict=True):
        torch.testing.assert_close(own - other, parameter.detach().double(), rtol=1e-6, atol=1e-9)
