"""A step is made of the micro-batches that its normalizer was planned for, or of a user's own, and of no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.data.batches.collate import collate
from lightning_sft.types import IGNORE, Batch, InputError, Normalize
from tests.helpers.gradients import ROWS, Recorder, Run, encoded, furthest, row_gradients, step_gradients

Make = Callable[..., Trainer]
SETTINGS: dict[str, Any] = {"optimizer": Recorder, "schedule": "constant"}
NOT_PLANNED = r"targets of this optimizer step weigh [\d.]+, but its batches have been planned for steps that weigh"


def data() -> SFTDataModule:
    return SFTDataModule(train=ROWS, tokens_per_batch=100)


def gradients(trainer: Trainer) -> list[Tensor]:
    found: list[Tensor] = trainer.optimizers[0].gradients  # type: ignore[attr-defined]  # of the Recorder
    return found


class Accumulates(Callback):
    """Changes the accumulation when steps have been planned."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.accumulate_grad_batches = 4


class Hides(Callback):
    """Takes targets from batches."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        batch.labels[..., ::2] = IGNORE


class Repeats(SFTDataModule):
    """Takes its second micro-batch twice, and its first never."""

    def train_dataloader(self) -> Any:
        batches = list(super().train_dataloader())
        return DataLoader(batches[1:2] + batches[1:], batch_size=None)  # type: ignore[arg-type]  # a list is a data set


@pytest.mark.parametrize("normalize", ["token", "sequence", "dataset"])
@pytest.mark.parametrize("change", [Accumulates, Hides, Repeats])
def test_another_step_than_planned_is_refused(
    pretrained: str, quiet_trainer: Make, normalize: Normalize, change: Any
) -> None:
    callbacks = [change()] if issubclass(change, Callback) else []
    given = data() if callbacks else Repeats(train=ROWS, tokens_per_batch=100)
    trainer = quiet_trainer(accumulate_grad_batches=2, callbacks=callbacks)
    with pytest.raises(InputError, match=NOT_PLANNED):
        trainer.fit(SFTModule(pretrained, normalize=normalize, **SETTINGS), given)


@pytest.mark.parametrize("is_own", [False, True], ids=["alone", "in another data module"])
def test_a_loader_that_does_not_know_its_trainer_is_refused(pretrained: str, quiet_trainer: Make, is_own: bool) -> None:
    ours = SFTDataModule(train=ROWS, tokens_per_batch=100, tokenizer=pretrained)
    ours.setup("fit")

    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return ours.train_dataloader()

    with pytest.raises(InputError, match=r"trainer.fit\(module, datamodule=data\)"):
        quiet_trainer(accumulate_grad_batches=2).fit(
            SFTModule(pretrained, **SETTINGS), Data() if is_own else ours.train_dataloader()
        )


class Doubled(SFTModule):
    """Doubles the weights of the second half of its targets."""

    planned = True

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch.target_weights[:, batch.target_weights.shape[1] // 2 :] *= 2
        batch.normalizer = batch.normalizer if self.planned else None
        return batch


class Weighted(Doubled):
    """Says so."""

    planned = False


# Lightning says of each module with this hook that it is not that of the data module
@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer`")
def test_weights_that_change_after_they_are_planned_are_refused_or_normalized_late(
    pretrained: str, quiet_trainer: Make
) -> None:
    with pytest.raises(InputError, match=rf"{NOT_PLANNED} .* batch.normalizer = None"):
        quiet_trainer().fit(Doubled(pretrained, **SETTINGS), data())
    wanted: list[Tensor] = []

    class Alone(Callback):
        """The gradient of the weighted mean of each batch."""

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, i: int) -> None:
            total, weight = pl_module(batch)
            parameters = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
            of_batch = torch.autograd.grad(-total / weight, parameters)
            wanted.append(torch.cat([gradient.flatten() for gradient in of_batch]))

    trainer = quiet_trainer(callbacks=[Alone()])
    trainer.fit(Weighted(pretrained, **SETTINGS), data())
    assert len(wanted) > 2
    assert furthest(gradients(trainer), wanted) <= 1e-5


class Ends(SFTModule):
    """Ends its first epoch within its second step of two micro-batches."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        super().on_train_batch_start(batch, batch_idx)
        return -1 if self.trainer.current_epoch == 0 and batch_idx == 3 else None


def test_a_step_that_its_epoch_ends_within_is_forgotten(pretrained: str, quiet_trainer: Make) -> None:
    def late(examples: Any) -> Batch:
        batch = collate(examples, packed=False)
        batch.normalizer = None
        return batch

    examples, run = encoded(pretrained), Run()
    trainer = quiet_trainer(accumulate_grad_batches=2, callbacks=[run], max_epochs=2, precision="64-true")
    trainer.fit(Ends(pretrained, **SETTINGS), DataLoader(examples, batch_size=2, collate_fn=late))
    rows = row_gradients(pretrained, examples, torch.float64)
    wanted = [step for part in (run.consumed[:2], run.consumed[4:]) for step in step_gradients(rows, [part], 2)]
    assert len(wanted) == 4
    assert furthest(gradients(trainer), wanted) <= 1e-10
