"""A disk that is full on one of two ranks, for a checkpoint or the files beside it, for test_failing_ranks."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lightning.pytorch import Callback, Trainer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks.checkpoint import SafeCheckpoint
from lightning_sft.callbacks.ledger import SampleLedger
from lightning_sft.callbacks.record import RunRecord
from lightning_sft.types import InputError
from tests.helpers.gradients import QUIET, ROWS

FULL = "No space left on device"
SAVE = "lightning_sft.checkpoints.writing.torch.save"
WRITE = "torch.distributed.checkpoint.filesystem._write_item"
CASES = {
    "facts": ("fsdp2", 0, SAVE),  # strategy, which rank cannot write, and what
    "shard": ("fsdp2", 1, WRITE),
    "file": ("ddp", 0, SAVE),
}
HOW = {"in background": True, "while training waits": False}
FILES = {
    "samples.jsonl": (SampleLedger, 0),  # what writes it, and the step after which the disk of the first rank is full
    "run.json": (RunRecord, 0),
    "metrics.jsonl": (RunRecord, 1),
}


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, FULL)


def run(pretrained: str, out: Path, name: str, how: str) -> None:
    """A fit that saves after each step; each rank writes down how it ends."""
    rank, (strategy, of_rank, function) = int(os.environ["RANK"]), CASES[name]
    saver = SafeCheckpoint(out / f"{name} {how}", 1, None, in_background=HOW[how])
    settings: dict[str, Any] = {**QUIET, "enable_checkpointing": True, "max_epochs": 9, "callbacks": [saver]}
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, **settings)
    try:
        with patch(function, full) if rank == of_rank else nullcontext():
            trainer.fit(SFTModule(pretrained), SFTDataModule(train=ROWS, tokens_per_batch=100))
    except InputError as error:
        (out / f"{name} {how} {rank}.txt").write_text(str(error))


class Fills(Callback):
    """A disk that is full from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.is_global_zero:
            patch("lightning_sft.io.disk.os.fsync", full).start()


def run_of_file(pretrained: str, out: Path, name: str) -> None:
    """A fit that saves its last step alone, beside a file that cannot be written."""
    kind, step = FILES[name]
    saver = SafeCheckpoint(out / f"beside {name}", None, None)
    settings: dict[str, Any] = {**QUIET, "enable_checkpointing": True, "max_epochs": 2}
    settings["callbacks"] = [Fills(step), saver, kind(str(out / name), every_n_steps=1)]
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", **settings)
    try:
        trainer.fit(SFTModule(pretrained), SFTDataModule(train=ROWS, tokens_per_batch=100))
    except InputError as error:
        (out / f"{name} {os.environ['RANK']}.txt").write_text(str(error))
    finally:
        patch.stopall()


if __name__ == "__main__":
    for case in CASES:
        for when in HOW:
            run(sys.argv[1], Path(sys.argv[2]), case, when)
    for file in FILES:
        run_of_file(sys.argv[1], Path(sys.argv[2]), file)
