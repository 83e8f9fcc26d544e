"""What the tests of verify verify: a tiny model and a few rows."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.optim import AdamW

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.commands.verify.subject import Subject
from lightning_sft.model.tuning.adapters import Lora
from tests.helpers.gradients import ROWS

LORA = {"lora": Lora(r=4, dropout=0.3), "neftune_alpha": 5.0}


def settings(folder: Path, **changed: Any) -> SimpleNamespace:
    """Settings of a trainer as the command line has them."""
    own: dict[str, Any] = {"accelerator": "cpu", "devices": "1", "num_nodes": 1, "accumulate_grad_batches": 1}
    own |= {"limit_train_batches": None, "overfit_batches": 0.0, "fast_dev_run": False, "precision": None}
    return SimpleNamespace(**{**own, "strategy": "auto", "default_root_dir": str(folder), **changed})


def subject(
    pretrained: str, folder: Path, data: Any = None, samples: Any = None, kind: Any = SFTModule, **model: Any
) -> Subject:
    """What is verified of ROWS."""
    module = kind(pretrained, optimizer=partial(AdamW, lr=0.01), warmup=0.0, **model)
    return Subject.of(
        module, SFTDataModule(**{"train": ROWS, "cache": None, **(data or {})}), settings(folder), **(samples or {})
    )
