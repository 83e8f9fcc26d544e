"""The objective and the data without a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from torch.optim import AdamW

from lightning_sft import SFTDataModule, SFTModule
from tests.helpers.dropping import blocks, run_code
from tests.helpers.gradients import ROWS


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2:
            self.losses.append(trainer.callback_metrics["train/loss"].item())


@pytest.mark.usefixtures("project")
def test_fabric_takes_the_steps_of_the_trainer(pretrained: str, quiet_trainer: Callable[..., Trainer]) -> None:
    scope, of_trainer = run_code("Fabric"), Losses()
    module = SFTModule(
        pretrained,
        optimizer=lambda groups: AdamW(groups, lr=1e-3, weight_decay=0.01),
        schedule="constant",
        warmup=0.0,
    )
    trainer = quiet_trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=[of_trainer])
    trainer.fit(module, SFTDataModule(train=ROWS, tokens_per_batch=100))
    assert len(of_trainer.losses) > 6
    assert scope["losses"] == pytest.approx(of_trainer.losses, rel=1e-6)
    assert of_trainer.losses[-1] < of_trainer.losses[0]


def test_the_loop_is_short() -> None:
    code = [line for line in blocks("Fabric")[0].splitlines() if line and "import" not in line]
    assert len(code) <= 25


def test_without_a_trainer_the_data_are_those_of_a_first_epoch(
    pretrained: str, quiet_trainer: Callable[..., Trainer]
) -> None:
    data, seen = SFTDataModule(train=ROWS, tokens_per_batch=100, tokenizer=pretrained), []

    class Spy(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch.provenance)

    data.setup("fit")
    alone = [batch.provenance for batch in data.train_dataloader()]
    quiet_trainer(callbacks=[Spy()]).fit(SFTModule(pretrained), data)
    assert alone == seen
    assert [batch.provenance for batch in data.train_dataloader()] != alone  # the trainer is in its second epoch
