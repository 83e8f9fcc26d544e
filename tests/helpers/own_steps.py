"""Steps of own batches with an auxiliary loss, also under torchrun: the gradients that a fit applies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sft import SFTModule
from lightning_sft.types import InputError
from tests.helpers.gradients import QUIET, Recorder
from tests.helpers.pages import blocks, page, section

CASES = {("Added", "ddp"): 1, ("Penalized", "ddp"): 1, ("Penalized", "ddp_find_unused_parameters_true"): 2}
"""Class, strategy and accumulation of the fits in two processes; the last passes its outputs through a function."""

LACKING = {"one": [3, 0, 5, 0], "both": [0, 0, 0, 0]}
"""Targets of the batches that two ranks take in turn."""


def classes() -> dict[str, type[SFTModule]]:
    """The classes of the page, with an auxiliary loss in ``forward`` and in ``training_step``."""
    scope: dict[str, Any] = {"__name__": "page"}
    for block in blocks(section(page("howto/subclass.md"), "## An auxiliary loss"), "python"):
        exec(block.partition("\ntrainer = ")[0], scope)
    return {name: scope[name] for name in ("Penalized", "Added")}


def batches(counts: list[int]) -> list[dict[str, Tensor]]:
    """Batches of a row with so many targets each."""
    made = []
    for number, count in enumerate(counts):
        ids = torch.arange(20)[None] + 20 * number
        made.append({"input_ids": ids, "labels": torch.where(torch.arange(20) < 20 - count, -100, ids)})
    return made


def applied(kind: type[SFTModule], pretrained: str, data: Any, **settings: Any) -> tuple[list[Tensor], Trainer]:
    """The gradient of each step of an epoch, in float64."""
    module = kind(pretrained, optimizer=Recorder, schedule="constant", warmup=0.0)
    given = {**QUIET, "devices": 1, **settings}
    trainer = Trainer(accelerator="cpu", max_epochs=1, precision="64-true", **given)
    trainer.fit(module, DataLoader(data, batch_size=None) if isinstance(data, list) else data)
    return trainer.optimizers[0].gradients, trainer


if __name__ == "__main__":  # under torchrun: two ranks, whose batches have unequal numbers of targets
    pretrained, out = sys.argv[1:]
    for (name, strategy), accumulate in CASES.items():
        settings: dict[str, Any] = {"devices": 2, "strategy": strategy, "accumulate_grad_batches": accumulate}
        gradients, _ = applied(classes()[name], pretrained, batches([3, 9, 5, 1]), **settings)
        torch.save(gradients, Path(out) / f"{name}.{strategy}.rank{torch.distributed.get_rank()}")
    for name, counts in LACKING.items():
        try:
            found: Any = applied(SFTModule, pretrained, batches(counts), devices=2, strategy="ddp")[0]
        except InputError as error:
            found = str(error)
        torch.save(found, Path(out) / f"{name}.rank{torch.distributed.get_rank()}")
