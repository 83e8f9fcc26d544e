"""A fit whose workers are started by spawn or forkserver, beside one without workers; run by test_platforms."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_pretrained
from tests.helpers.gradients import QUIET, ROWS


def loss(pretrained: str, num_workers: int, streaming: bool) -> float:
    """After two steps."""
    trainer = Trainer(accelerator="cpu", max_steps=2, **QUIET)
    data = SFTDataModule(train=ROWS, tokens_per_batch=100, num_workers=num_workers, streaming=streaming)
    trainer.fit(SFTModule(pretrained, schedule="constant"), data)
    return float(trainer.callback_metrics["train/loss"])


if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1], force=True)
    model = tiny_pretrained(Path(sys.argv[2]))
    for streams in (False, True):
        assert loss(model, 1, streams) == loss(model, 0, streams)
