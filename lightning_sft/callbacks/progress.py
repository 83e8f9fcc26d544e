"""A progress bar with the metrics of training."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from lightning_sft.io.arguments import NonNegative, check_arguments
from lightning_sft.training.trainer import total_steps

_SHOWN = {
    "loss": ("train/loss", "{:.3f}"),
    "val": ("val/loss", "{:.3f}"),
    "tokens/s": ("train/tokens_per_second", "{:,.0f}"),
    "targets": ("train/targets_seen", "{:,.0f}"),
    "lr": ("lr", "{:.2g}"),
    "|g|": ("train/gradient_norm", "{:.2f}"),
}


class TrainingProgress(RichProgressBar):
    """A progress bar with loss, tokens per second, targets seen, learning rate, gradient norm, and the time left.

    The time left is an estimate for the whole fit from the average pace. Metrics are read from the device at most every
    ``every_seconds``, because that waits for it.

    Args:
        every_seconds: Minimum number of seconds between two updates of the metrics.
    """

    def __init__(self, every_seconds: NonNegative = 0.5) -> None:
        super().__init__()
        check_arguments(TrainingProgress, locals())
        self.every_seconds, self._read, self._shown = every_seconds, 0.0, dict[str, Any]()
        self._begin, self._first, self._total = 0.0, 0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to measure the pace."""
        super().on_train_start(trainer, pl_module)
        self._begin, self._first = time.monotonic(), trainer.global_step
        self._total = total_steps(trainer, may_be_endless=True)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The metrics shown beside the bar."""
        now = time.monotonic()
        if now - self._read >= self.every_seconds or trainer.global_step >= self._total:
            found = trainer.callback_metrics
            self._shown = {name: form.format(float(found[key])) for name, (key, form) in _SHOWN.items() if key in found}
            done, left = trainer.global_step - self._first, self._total - trainer.global_step
            if done and left > 0:
                seconds = (now - self._begin) / done * left
                self._shown["left"] = str(timedelta(seconds=round(seconds)))
            self._read = now
        return self._shown
