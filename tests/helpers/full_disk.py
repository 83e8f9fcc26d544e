"""A disk that is full on one of two ranks which save a checkpoint, run under torchrun by test_failing_ranks."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lightning.pytorch import Trainer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks.checkpoint import SafeCheckpoint
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


if __name__ == "__main__":
    for case in CASES:
        for when in HOW:
            run(sys.argv[1], Path(sys.argv[2]), case, when)
