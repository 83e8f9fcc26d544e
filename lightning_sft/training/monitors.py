"""Metrics that callbacks and schedules ask for, compared with those that are logged, before training."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sft.io.closest import did_you_mean
from lightning_sft.io.named import OurNames
from lightning_sft.training.trainer import callbacks_of
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

VALIDATE = "set data.val, and leave trainer.limit_val_batches above 0"
"""What a fit needs to validate, for messages."""

_OF_TARGETS = ("loss", "token_accuracy", "entropy")
_OF_STEPS = (
    *("gradient_norm", "tokens_per_second", "targets_per_second", "packing_efficiency", "mfu", "peak_memory_gib"),
    *("tokens_seen", "targets_seen", "expert_imbalance", "unused_experts", "router_loss"),
)
NAMES = (
    *(f"val/{name}" for name in (*_OF_TARGETS, "perplexity", "bits_per_byte")),
    *(f"train/{name}" for name in (*_OF_TARGETS, *_OF_STEPS)),
    *("lr", "drift/kl"),
)
"""Metrics that ``SFTModule`` and our callbacks log in a fit, but for those of parts of the data or of the model."""

_OF_PARTS = re.compile(
    r"(train|val)/loss/.+|val/loss_(turn|position)/.+|drift/.+|lr-.+|train/(fill|share_of_peak)|.+/dataloader_idx_\d+"
)


def check_monitor(trainer: Trainer, who: str, metric: str) -> None:
    """Refuse a metric that nothing logs; where code of the user may log it, warn of one that is like one of ours.

    Args:
        trainer: The Lightning trainer.
        who: What asks for the metric.
        metric: Name of the metric.

    Raises:
        InputError: When nothing logs it.
    """
    if metric in NAMES or _OF_PARTS.fullmatch(metric):
        return
    packages = {type(one).__module__.partition(".")[0] for one in (trainer.lightning_module, *callbacks_of(trainer))}
    if packages <= {"lightning", "lightning_sft"}:
        closest = did_you_mean([metric], NAMES, cutoff=0.6)
        names = ", ".join(sorted(name for name in NAMES if name.startswith("val/")))
        raise InputError(f"{who} monitors {metric!r}, which nothing logs.{closest} A validation logs {names}.")
    if closest := did_you_mean([metric], NAMES, cutoff=0.85):  # misspelt, not a metric of the user's own
        rank_zero_warn(f"{who} monitors {metric!r}, which SFTModule does not log.{closest}")


def check_monitors(trainer: Trainer) -> None:
    """Refuse callbacks that ask for metrics that nothing logs.

    Args:
        trainer: The Lightning trainer, with its data set up.

    Raises:
        InputError: When there is one; for early stopping, or Lightning's saver of the best checkpoint, without the
            validation that it waits for. Our ``BestCheckpoint``, which is there by default, keeps none then.
    """
    for callback in callbacks_of(trainer):
        metric, who = getattr(callback, "monitor", None), type(callback).__name__
        if not isinstance(metric, str) or not getattr(callback, "strict", True):
            continue
        check_monitor(trainer, who, metric)
        waits = isinstance(callback, (EarlyStopping, ModelCheckpoint)) and not isinstance(callback, OurNames)
        if waits and metric.startswith("val/") and not trainer.enable_validation:
            raise InputError(f"{who} monitors {metric!r}, and there are no validation data: {VALIDATE}.")
