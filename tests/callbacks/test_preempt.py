"""More in test_resume: processes that are told to end, two of them by one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks.preempt import Preempt, Preempted
from lightning_sft.resume import PLACE
from lightning_sft.types import InputError

Make = Callable[..., Trainer]


class Tell(Callback):
    """Sends this process a signal, in training or in validation."""

    def __init__(self, number: int, of: str = "train") -> None:
        self.number, self.of, self.stepped_on = number, of, 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self.of == "train" and batch_idx == 1:
            os.kill(os.getpid(), self.number)
        self.stepped_on = batch_idx

    def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
        if self.of == "val" and not trainer.sanity_checking:
            os.kill(os.getpid(), self.number)


def fit(pretrained: str, trainer: Trainer, rows: list[dict[str, str]]) -> None:
    data = SFTDataModule(train=rows, val=rows, tokens_per_batch=60)
    trainer.fit(SFTModule(pretrained, schedule="constant"), data)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_fit_after_the_step_with_a_checkpoint_and_code_75(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]], tmp_path: Path, number: int
) -> None:
    before, tell = signal.getsignal(number), Tell(number)
    trainer = quiet_trainer(accumulate_grad_batches=4, callbacks=[tell, Preempt()])
    with pytest.raises(Preempted) as stop:
        fit(pretrained, trainer, rows)
    assert stop.value.code == 75
    assert tell.stepped_on == 3
    saved = torch.load(tmp_path / "checkpoints" / "resume-step=1.ckpt", weights_only=True)
    assert saved[PLACE]["micro_batches"] == 4
    assert signal.getsignal(number) == before


def test_in_a_validation_it_does_not_wait_for_the_end_and_the_validation_is_still_due(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path / "own", save_top_k=0)
    trainer = quiet_trainer(callbacks=[Tell(signal.SIGTERM, "val"), Preempt(), saver], enable_checkpointing=True)
    with pytest.raises(Preempted):
        fit(pretrained, trainer, rows)
    [path] = (tmp_path / "own").glob("resume-*.ckpt")  # where the user's own are
    place = torch.load(path, weights_only=True)[PLACE]
    assert (place["is_last"], place["is_validated"]) == (True, False)
    assert "val/loss" not in trainer.callback_metrics


def test_an_unknown_signal_is_refused() -> None:
    with pytest.raises(InputError, match=r"There is no signal TERM. Expected names such as SIGTERM"):
        Preempt(["TERM"])
