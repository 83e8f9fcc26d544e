"""A run that is interrupted as a terminal and SLURM do it, for test_preempt: the signal reaches its data workers too.

python -m tests.helpers.interrupting PRETRAINED FOLDER SIGNAL TIMES '{"num_workers": 2}'
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from lightning.pytorch import Callback, Trainer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import Preempt, SafeCheckpoint
from tests.helpers.gradients import QUIET, ROWS


class Tell(Callback):
    """Sends all processes a signal in the middle of the first optimizer step."""

    def __init__(self, number: signal.Signals, times: int) -> None:
        self.number, self.times = number, times

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            for _ in range(self.times):
                os.killpg(0, self.number)


if __name__ == "__main__":
    os.setpgrp()  # signals are sent to this process and its data workers alone
    pretrained, folder, name, times, settings = sys.argv[1:]
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[Tell(signal.Signals[name], int(times)), Preempt(), SafeCheckpoint(f"{folder}/checkpoints")],
        accumulate_grad_batches=4,
        max_steps=3,
        **{**QUIET, "enable_checkpointing": True},
    )
    data = SFTDataModule(train=ROWS, tokens_per_batch=100, cache=None, **json.loads(settings))
    trainer.fit(SFTModule(pretrained), data)
