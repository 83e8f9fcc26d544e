"""A run that is killed and resumed, against the same run left alone: losses and weights, bit for bit.

The run that is left alone is taken twice: where these two differ, the device is not deterministic, and a resumed run
cannot be either.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from transformers import AutoTokenizer

from benchmarks.environments import ROOT
from benchmarks.gpu.shapes import architecture, write_model
from benchmarks.gpu.throughput import quiet
from benchmarks.record import Record
from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import SafeCheckpoint
from lightning_sft.checkpoints.writing import newest

STEPS, KILLED_IN = 6, 4
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "32-true, accumulated": {"precision": "32-true", "trainer": {"accumulate_grad_batches": 2}},
    "16-mixed, clipped": {"precision": "16-mixed", "trainer": {"gradient_clip_val": 1.0}},
    "LoRA with dropout": {"precision": "bf16-mixed", "module": {"lora": {"r": 4, "dropout": 0.1}}},
    "compiled, checkpointing": {
        "precision": "bf16-mixed",
        "module": {"kernels": "compiled", "gradient_checkpointing": True},
    },
}


class _Watch(Callback):
    """Writes the loss of each step to a file as a hexadecimal number, and kills the process inside a step.

    Args:
        path: The file.
        killed_in: The step, counted from 1; 0 for none.
    """

    def __init__(self, path: Path, killed_in: int) -> None:
        self.path, self.killed_in, self.step = path, killed_in, 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """A resumed run does not start at 0."""
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step may have ended."""
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{self.step} {float(trainer.callback_metrics['train/loss']).hex()}\n")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The gradients are there, the update is not."""
        if trainer.global_step + 1 == self.killed_in:
            os.kill(os.getpid(), signal.SIGKILL)


def run(given: SimpleNamespace) -> None:
    """Start a run in its folder, or resume the one that is there, and save its weights.

    Args:
        given: ``run`` (its folder), ``killed_in``, ``variant``, and what all cases get.
    """
    folder, variant = Path(given.run), VARIANTS[given.variant]
    seed_everything(given.seed, verbose=False)
    module = SFTModule(given.model, optimizer=partial(torch.optim.AdamW, lr=1e-3), **variant.get("module", {}))
    length = 64 if given.quick else 2048
    data = SFTDataModule(given.rows["short"], max_length=length, tokens_per_batch=length, cache=given.cache)
    checkpoints = SafeCheckpoint(str(folder / "checkpoints"), every_n_train_steps=1)
    trainer = Trainer(
        **{**quiet(given.device), "enable_checkpointing": True, **variant.get("trainer", {})},
        precision=variant["precision"],
        max_steps=STEPS,
        deterministic=True,
        log_every_n_steps=1,
        default_root_dir=folder,
        callbacks=[_Watch(folder / "losses", given.killed_in), checkpoints],
    )
    trainer.fit(module, data, ckpt_path=newest([folder / "checkpoints"]))
    torch.save({name: weight.cpu() for name, weight in module.state_dict().items()}, folder / "weights")


def outcome(folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The losses of all steps, in hexadecimal, and the weights of a run."""
    return (folder / "losses").read_text(encoding="utf-8"), torch.load(folder / "weights", weights_only=True)


def check(given: SimpleNamespace) -> None:
    """Take the run twice, and once killed and resumed, and record whether they are the same.

    Args:
        given: ``variant``, and what all cases get.
    """
    here = Path(given.folder)
    config = architecture("llama", given.quick)
    model = write_model(here / "model", config, AutoTokenizer.from_pretrained(given.tokenizer), "cpu", given.seed)
    for name, killed_in in (("whole", [0]), ("again", [0]), ("resumed", [KILLED_IN, 0])):
        (here / name).mkdir(parents=True)
        for kill in killed_in:
            task = {**vars(given), "task": "resume_run", "run": str(here / name), "killed_in": kill, "model": model}
            command = [sys.executable, "-P", str(ROOT / "benchmarks" / "gpu" / "case.py"), json.dumps(task)]
            code = subprocess.run(command, check=False).returncode
            if code != (-signal.SIGKILL if kill else 0):
                raise RuntimeError(f"{name}: exit code {code}, expected {-signal.SIGKILL if kill else 0}")
    whole, again, resumed = (outcome(here / name) for name in ("whole", "again", "resumed"))
    found = {"deterministic": same(whole, again), "resumed": same(whole, resumed)}
    Record(given.out).write(**found, steps=STEPS, killed_in=KILLED_IN, passed=all(found.values()))


def same(one: tuple[str, dict[str, torch.Tensor]], other: tuple[str, dict[str, torch.Tensor]]) -> bool:
    """Whether losses and weights of two runs are equal bit for bit."""
    (losses, weights), (other_losses, other_weights) = one, other
    equal = weights.keys() == other_weights.keys() and all(torch.equal(weights[n], other_weights[n]) for n in weights)
    return losses == other_losses and equal
