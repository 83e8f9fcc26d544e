"""How long steps wait for checkpoints that are written in line, and in the background.

    python benchmarks/saving.py
    torchrun --nproc-per-node 2 benchmarks/saving.py --strategy fsdp2

A model of random weights is trained with AdamW, in float32, and saved after each step. What counts is the time that a
step waits in `SafeCheckpoint.save`, once the write before has ended. The first checkpoint in the background allocates
the buffers of its copy, and is shown by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import AdamW

import lightning_sft.strategies  # noqa: F401 -- which registers fsdp2
from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import SafeCheckpoint
from lightning_sft.demos import tiny_pretrained

ROWS = [{"prompt": f"question {i} " + "why " * 9, "completion": "because " * 9} for i in range(64)]


class TimedSaver(SafeCheckpoint):
    """Measures the seconds that `save` takes of a step."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.waited: list[float] = []

    def save(self, trainer: Trainer) -> None:
        """Save, and note the seconds where there was something to save, without those of a write before."""
        self.finish(trainer)
        begin, step = time.perf_counter(), self._last_global_step_saved
        super().save(trainer)
        if self._last_global_step_saved != step:
            self.waited.append(time.perf_counter() - begin)


def measure(pretrained: str, folder: Path, given: argparse.Namespace, in_background: bool) -> dict[str, Any]:
    """Train, and return what was measured."""
    saver = TimedSaver(folder / f"{in_background}", 1, None, in_background=in_background)
    trainer = Trainer(
        accelerator=given.accelerator,
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        strategy=given.strategy,
        max_steps=given.saves,
        max_epochs=-1,
        callbacks=[saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = SFTModule(pretrained, optimizer=partial(AdamW, lr=1e-5))
    trainer.fit(module, SFTDataModule(train=ROWS, tokens_per_batch=given.tokens))
    last = Path(saver.best_model_path)
    files = [path for path in last.rglob("*") if path.is_file()] if last.is_dir() else [last]
    return {
        "in_background": in_background,
        "gigabytes": round(sum(path.stat().st_size for path in files) / 1e9, 3),
        "first_wait": round(saver.waited[0], 3),
        "median_wait": round(statistics.median(saver.waited[1:]), 3),
    }


def main() -> None:
    """Measure both, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--folder", help="where checkpoints are written, on the disk to be measured")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=150, help="maximum number of tokens of a step and rank")
    parser.add_argument("--saves", type=int, default=5)
    given = parser.parse_args()
    size = {"hidden_size": given.hidden, "intermediate_size": 4 * given.hidden, "num_hidden_layers": given.layers}
    with TemporaryDirectory(dir=given.folder) as temporary:
        pretrained = tiny_pretrained(Path(temporary, "model"), **size)
        found = [measure(pretrained, Path(temporary), given, in_background) for in_background in (False, True)]
    if os.environ.get("RANK", "0") == "0":
        for line in found:
            print(json.dumps(line))
        print(f"a step waits for {found[1]['median_wait'] / found[0]['median_wait']:.1%} of a save in line")


if __name__ == "__main__":
    main()
