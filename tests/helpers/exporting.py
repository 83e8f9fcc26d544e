"""Fits that export, also under torchrun for each strategy, and the checkpoints that the same model gives."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.optim import AdamW

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import HFExport
from tests.helpers.gradients import QUIET, ROWS
from tests.helpers.parallel import CASES
from tests.helpers.processes import torchrun

TWO = ["ddp", "fsdp2", "tensor"]
ZERO = ["deepspeed1", "deepspeed2", "deepspeed3"]


def trained(
    pretrained: str, export: HFExport | None = None, data: Any = None, model: Any = None, **settings: Any
) -> Trainer:
    """A trainer that has made three steps of AdamW."""
    optimizer = partial(AdamW, lr=0.01)
    module = SFTModule(pretrained, optimizer=optimizer, schedule="constant", warmup=0.0, **(model or {}))
    ckpt_path = settings.pop("ckpt_path", None)
    callbacks = [*settings.pop("callbacks", ()), *([] if export is None else [export])]
    defaults = {"accelerator": "cpu", "max_steps": 3, "max_epochs": -1, "callbacks": callbacks}
    trainer = Trainer(**QUIET | defaults | settings)
    trainer.fit(
        module,
        SFTDataModule(**{"train": ROWS, "val": ROWS, "tokens_per_batch": 100} | (data or {})),
        ckpt_path=ckpt_path,
    )
    return trainer


def launch(names: list[str], pretrained: str, out: Path) -> None:
    """Run strategies one after the other, in two processes."""
    torchrun("tests.helpers.exporting", pretrained, str(out), *names)


if __name__ == "__main__":  # for each strategy a folder after two steps, one at the end, and a checkpoint of the end
    pretrained, out, *names = sys.argv[1:]
    for name in names:
        settings = {"model": CASES[name].model, "devices": 2, "strategy": CASES[name].strategy}
        trainer = trained(pretrained, HFExport(f"{out}/{name}", every_n_steps=2), **settings)
        trainer.save_checkpoint(f"{out}/{name}.ckpt")
        if name == "ddp":  # what does not pass has to reach every rank, and not leave one of them waiting
            try:
                trained(pretrained, HFExport(f"{out}/failing", dtype="bfloat16", max_kl=0.0), devices=2, strategy="ddp")
            except Exception as error:
                rank = torch.distributed.get_rank()
                Path(out, f"failing.rank{rank}").write_text(f"{type(error).__name__}: {error}")
