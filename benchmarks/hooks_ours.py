"""What the benchmark adds to `lightning-sft fit` by class path: a callback that records, and batches that are given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule

from benchmarks.record import Record, die, rows_of
from lightning_sft.types import IGNORE, Batch


class Recorder(Callback):
    """Records every optimizer step of a fit.

    Args:
        out: File for the record.
        weights: File for the weights after the fit.
        dies_after: Step after which the process kills itself.
    """

    def __init__(self, out: str, weights: str | None = None, dies_after: int | None = None) -> None:
        self.record, self.weights, self.dies_after = Record(out), weights, dies_after
        self.steps = self.tokens = self.targets = self.positions = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """A resumed run begins behind the steps of its checkpoint."""
        self.steps = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the micro-batch, and close the step if it was its last."""
        mask = None if isinstance(batch, Batch) else batch["attention_mask"]  # packs have no padding
        batch = Batch.of(batch)
        ranks = trainer.world_size  # the packs of all ranks are full to 99 %: one speaks for all
        self.tokens += ranks * int(batch.input_ids.numel() if mask is None else mask.sum())
        self.targets += ranks * int((batch.labels != IGNORE).sum())
        self.positions += ranks * batch.input_ids.numel()
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            if trainer.is_global_zero:
                loss = float(trainer.callback_metrics["train/loss"])
                self.record.step(loss, self.tokens, self.targets, self.positions)
            self.tokens = self.targets = self.positions = 0
            if self.steps == self.dies_after:
                die()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the weights."""
        if self.weights:
            torch.save(pl_module.model.state_dict(), self.weights)


class Given(LightningDataModule):
    """Rows of token ids, in order, as plain padded batches.

    Args:
        path: File of the rows.
        size: Rows of a batch.
    """

    def __init__(self, path: str, size: int) -> None:
        super().__init__()
        self.path, self.size = path, size

    def train_dataloader(self) -> Any:
        """Batches as a Hugging Face collator makes them."""
        rows = rows_of(self.path)
        return _InOrder([_padded(rows[i : i + self.size]) for i in range(0, len(rows), self.size)])


class _InOrder:
    """Not a DataLoader, which Lightning would shuffle; nor a list, which it would take for several loaders."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    def column(name: str, fill: int) -> torch.Tensor:
        values = [torch.tensor(row[name]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)

    ids, labels = column("input_ids", 0), column("labels", IGNORE)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row["input_ids"]) for row in rows])[:, None]
    return {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}
