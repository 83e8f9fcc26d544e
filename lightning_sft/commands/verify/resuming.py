"""Check of a resumed run against an uninterrupted one."""

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
    """Records the loss of each micro-batch by step, and saves a checkpoint after one of the steps.

    Args:
        save_after: Step after which to save.
        path: Path of the checkpoint; ``None`` saves none.
    """

    def __init__(self, save_after: int = 0, path: str | None = None) -> None:
        self.save_after, self.path = save_after, path
        self.of_step: dict[str, list[float]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the disk space.

        Raises:
            InputError: When the disk has no room for the checkpoint.
        """
        if self.path is not None:
            check_disk(Path(self.path).parent, bytes_of_checkpoint(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the loss; if the optimizer has stepped, ``global_step`` already includes this step."""
        took = is_between_steps(trainer)
        step = trainer.global_step - took + 1
        self.of_step.setdefault(f"step {step}", []).append(float(outputs["loss"]))
        if took and trainer.global_step == self.save_after and self.path is not None:
            trainer.save_checkpoint(self.path)


def check_resuming(subject: Subject) -> Outcome:
    """Check that a resumed run equals an uninterrupted one bit for bit.

    A few steps run with everything as configured: optimizer, schedule, precision, dropout, adapters. After half of them
    a checkpoint is saved, from which a new module and trainer resume. The losses of each micro-batch and all weights at
    the end are compared without tolerance; on GPUs, deterministic kernels are used where available.
    """
    steps, half = 4, 2
    outcome = Outcome(
        "resume",
        "a run that resumes from a checkpoint equals the uninterrupted run, bit for bit",
        "steps, and tensors, that differ in any bit from the uninterrupted run",
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
    """Copies of the trained parameters on the CPU."""
    named = trainer.lightning_module.named_parameters()
    return {name: p.detach().cpu().clone() for name, p in named if p.requires_grad}
