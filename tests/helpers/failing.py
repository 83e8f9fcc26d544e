"""A NaN on one of two ranks under each strategy, run under torchrun by test_failing_ranks."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.types import Batch, LogLikelihood
from tests.helpers.gradients import QUIET
from tests.helpers.parallel import CASES, TRAIN

ENDS = "began", "ended"
"""Suffixes of the files in which each rank notes when its NaN came up, and when it had ended."""

POISON = "row 17"  # how messages name the row whose likelihood is NaN


class Poisoned(SFTModule):
    """Its likelihood is NaN wherever a micro-batch has the poisonous row, as packed documents can share a NaN."""

    def __init__(self, pretrained: str, note: Path, **settings: Any) -> None:
        super().__init__(pretrained, **settings)
        self.note = note

    def forward(self, batch: Batch) -> LogLikelihood:
        found = super().forward(batch)
        if not any(name.endswith(POISON) for name in batch.provenance):
            return found
        self.note.with_suffix(".began").write_text(str(time.time()))
        return replace(found, total=found.total * torch.nan, log_probs=found.log_probs * torch.nan)


def run(pretrained: str, name: str, out: Path) -> None:
    """Train, and validate, until the NaN; each rank writes down what it was told."""
    case = CASES[name]
    common: dict[str, Any] = {**QUIET, "accelerator": "cpu", "devices": 2, "max_epochs": 1, "num_sanity_val_steps": 0}
    for verb in ("fit", "validate") if case.stage != 3 else ("fit",):
        note = out / f"{name}-{verb}-{os.environ['RANK']}.txt"
        module, data = Poisoned(pretrained, note, **case.model), SFTDataModule(TRAIN, TRAIN, tokens_per_batch=100)
        trainer = Trainer(strategy=case.strategy, **common)
        try:
            getattr(trainer, verb)(module, data)
        except FloatingPointError as error:
            note.write_text(str(error))
            note.with_suffix(".ended").write_text(str(time.time()))


if __name__ == "__main__":
    given, where, *chosen = sys.argv[1:]
    for one in chosen:
        run(given, one, Path(where))
