"""How long steps wait for checkpoints that are written in line, and in the background.

    python benchmarks/saving.py
    torchrun --nproc-per-node 2 benchmarks/saving.py --strategy fsdp2

A model of random weights is trained with AdamW, in float32, and saved after each step. What counts is the time that
training waits for a checkpoint: where it is due, once the write before has ended, and before the next optimizer step.
The first checkpoint in the background allocates the buffers of its copy, and is shown by itself. A step that is shorter
than the copy waits for the rest of it, so its seconds are shown as well. `--busy` adds processes that keep a core and
the memory busy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
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
BUSY = """
import numpy
a, b = numpy.zeros((2, 2**25))
while True:
    b[:] = a
"""


class TimedSaver(SafeCheckpoint):
    """Measures the seconds that training waits for each checkpoint, and those of a step besides."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.waited: list[float] = []
        self.steps: list[float] = []
        self._end = math.nan

    def _begin_to_save(self, trainer: Trainer) -> None:
        """Save, and note the seconds where there was something to save, without those of a write before."""
        self.finish(trainer)
        begin, step = time.perf_counter(), self._last_global_step_saved
        super()._begin_to_save(trainer)
        self._end = time.perf_counter()
        if self._last_global_step_saved != step:
            self.waited.append(self._end - begin)

    def _wait_for_copy(self) -> None:
        begin = time.perf_counter()
        super()._wait_for_copy()
        if self.waited:
            self.steps.append(begin - self._end)
            self.waited[-1] += time.perf_counter() - begin


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
        "forward_and_backward": round(statistics.median(saver.steps[1:]), 3),
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
    parser.add_argument("--busy", type=int, default=0, help="processes that copy memory meanwhile")
    given = parser.parse_args()
    size = {"hidden_size": given.hidden, "intermediate_size": 4 * given.hidden, "num_hidden_layers": given.layers}
    with TemporaryDirectory(dir=given.folder) as temporary:
        pretrained = tiny_pretrained(Path(temporary, "model"), **size)
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(given.busy)]
        found = [measure(pretrained, Path(temporary), given, in_background) for in_background in (False, True)]
        for process in others:
            process.kill()
    if os.environ.get("RANK", "0") == "0":
        for line in found:
            print(json.dumps(line))
        print(f"a step waits for {found[1]['median_wait'] / found[0]['median_wait']:.1%} of a save in line")


if __name__ == "__main__":
    main()
