"""Predictions to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer


class PredictionWriter(Callback):
    """Writes what ``predict`` generates as JSONL, one row an input row, in the order of the input.

    Args:
        path: The file to write.
    """

    def __init__(self, path: str = "predictions.jsonl") -> None:
        self.path = Path(path)
        self._mine: list[dict[str, Any]] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's rows."""
        self._mine += outputs

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the rows of all ranks and write them on the first."""
        mine, self._mine = self._mine, []
        shares = [mine]
        if trainer.world_size > 1:
            shares = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(shares, mine)
        if trainer.is_global_zero:
            longest = max(map(len, shares))
            rows = [share[i] for i in range(longest) for share in shares if i < len(share)]  # rank r has r, r + n, ...
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            print(f"{len(rows)} predictions: {self.path}")
