"""What callbacks see and do between the loss and the step of the optimizer: the same on all ranks, the gradient of the
step and of nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_sft import Batch, SFTDataModule, SFTModule
from tests.helpers.draws import WAYS
from tests.helpers.gradients import ROWS
from tests.helpers.processes import torchrun

Make = Callable[..., Trainer]


@pytest.mark.parametrize("way", WAYS)
def test_ranks_whose_steps_draw_at_random_keep_the_same_weights(pretrained: str, tmp_path: Path, way: str) -> None:
    torchrun("tests.helpers.draws", pretrained, str(tmp_path), way)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*of_ranks, strict=True))


class Norms(Callback):
    """Norms of the gradient before each step."""

    def __init__(self) -> None:
        self.norms: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.norms.append(nn.utils.get_total_norm(parameter.grad for parameter in module.parameters()))


def test_callbacks_see_the_mean_gradient_also_of_unplanned_batches(pretrained: str, quiet_trainer: Make) -> None:
    def batch(tokens: int) -> dict[str, Tensor]:
        ids = torch.arange(5, 5 + tokens)[None]
        return {"input_ids": ids, "labels": ids.clone()}

    batches, seen = [batch(12), batch(30), batch(20)], Norms()
    trainer = quiet_trainer(callbacks=[seen], accumulate_grad_batches=3, max_epochs=1)
    module = SFTModule(pretrained, optimizer=lambda groups: SGD(groups, lr=1e-2))
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]  # a list is a data set
    module = SFTModule(pretrained)
    module.configure_model()
    likelihoods = [module.forward(Batch.of(own)) for own in batches]
    sum(-found.total for found in likelihoods).div(sum(found.weight for found in likelihoods)).backward()
    wanted = nn.utils.get_total_norm(parameter.grad for parameter in module.parameters())
    torch.testing.assert_close(seen.norms, [wanted])


class Thaws(Callback):
    """Lets all parameters have gradients from the second epoch on."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch:
            module.requires_grad_(True)


def test_parameters_that_no_optimizer_has_are_named(pretrained: str, quiet_trainer: Make) -> None:
    module = SFTModule(pretrained, frozen=["*.layers.0.*"])
    data = SFTDataModule(train=ROWS[:6], val=ROWS[6:8], tokens_per_batch=100)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* a gradient but no optimizer")
        quiet_trainer(max_epochs=2).fit(module, data)

    with pytest.warns(UserWarning, match=r"have a gradient but no optimizer, such as scorer.model.*layers\.0\."):
        quiet_trainer(max_epochs=2, callbacks=[Thaws()]).fit(SFTModule(pretrained, frozen=["*.layers.0.*"]), data)
