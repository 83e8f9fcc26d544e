"""A run that goes on from a checkpoint against the same run without an interruption."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_sft.checkpoints.writing import bytes_of_checkpoint, check_disk
from lightning_sft.commands.verify.subject import Subject
from lightning_sft.commands.verify.verdict import Case, Outcome
from lightning_sft.training.trainer import is_between_steps


class Losses(Callback):
    """Keeps the loss of each micro-batch by its step, and saves a checkpoint after one of the steps.

    Args:
        save_after: The step.
        path: Of the checkpoint; none by default.
    """

    def __init__(self, save_after: int = 0, path: str | None = None) -> None:
        self.save_after, self.path = save_after, path
        self.of_step: dict[str, list[float]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a disk without room for the checkpoint."""
        if self.path is not None:
            check_disk(Path(self.path).parent, bytes_of_checkpoint(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss; the optimizer step that it is of has been counted where it was taken."""
        took = is_between_steps(trainer)
        step = trainer.global_step - took + 1
        self.of_step.setdefault(f"step {step}", []).append(float(outputs["loss"]))
        if took and trainer.global_step == self.save_after and self.path is not None:
            trainer.save_checkpoint(self.path)


def check_resuming(subject: Subject) -> Outcome:
    """A run that goes on from a checkpoint has the losses and weights of one that was never interrupted, bit by bit.

    A few steps with everything as configured: optimizer, schedule, precision, dropout, adapters. After half of them a
    checkpoint is saved; a new module and trainer go on from it. Compared are the losses of each micro-batch and all
    weights at the end. There is no tolerance; on a GPU, deterministic kernels are asked for where there are some.
    """
    steps, half = 4, 2
    outcome = Outcome(
        "resume",
        "a run that goes on from a checkpoint repeats what it would have done, bit by bit",
        "steps, and tensors, that are not bit for bit those of the uninterrupted run",
    )
    settings: dict[str, Any] = {"max_steps": steps, "max_epochs": -1, "precision": subject.trainer.precision}
    settings["deterministic"] = "warn" if subject.device.type == "cuda" else None
    with tempfile.TemporaryDirectory(dir=subject.folder) as folder:
        path = str(Path(folder) / "half.ckpt")
        whole, rest = Losses(half, path), Losses()
        first = _weights(subject.fit(None, None, steps, callbacks=[whole], **settings))
        second = _weights(subject.fit(None, None, steps, ckpt_path=path, callbacks=[rest], **settings))
    after = {step: losses for step, losses in whole.of_step.items() if int(step.split()[1]) > half}
    wrong = [
        f"{step}: losses {rest.of_step.get(step)}, uninterrupted {after.get(step)}"
        for step in after.keys() | rest.of_step.keys()
        if rest.of_step.get(step) != after.get(step)
    ]
    name = f"losses of steps {half + 1} to {steps}"
    outcome.cases.append(Case(name, float(len(wrong)), 0.0, sorted(wrong)))
    unequal = [key for key in first if key not in second or not torch.equal(first[key], second[key])]
    outcome.cases.append(Case("weights at the end", float(len(unequal)), 0.0, unequal))
    return outcome


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    """What was trained, on the CPU."""
    named = trainer.lightning_module.named_parameters()
    return {name: p.detach().cpu().clone() for name, p in named if p.requires_grad}
