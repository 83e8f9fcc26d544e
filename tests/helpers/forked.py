"""A fit whose ranks are forks of this process, as in a notebook: ``python -m tests.helpers.forked MODEL FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import SafeCheckpoint
from lightning_sft.callbacks.ending import ending
from tests.helpers.gradients import ROWS

if __name__ == "__main__":
    pretrained, folder = sys.argv[1], Path(sys.argv[2])
    module, saves = SFTModule(pretrained), SafeCheckpoint(folder)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", max_steps=2, callbacks=[saves], **quiet)
    trainer.fit(module, SFTDataModule(train=ROWS, tokens_per_batch=100))
    torch.save(dict(module.named_parameters()), folder / "module.pt")
    (folder / "said.txt").write_text(ending(trainer), encoding="utf-8")
