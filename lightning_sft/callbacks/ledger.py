"""The sample log (ledger): the samples and the loss of each optimizer step."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.checkpoints.run_files import LEDGER_FILE, cut_off, refuse_anew
from lightning_sft.checkpoints.run_lock import FolderLock
from lightning_sft.io.arguments import Count, check_arguments, plain
from lightning_sft.io.disk import append
from lightning_sft.io.named import OurNames
from lightning_sft.training.trainer import first_rank_does, gather, is_between_steps
from lightning_sft.types import Batch, InputError


class SampleLedger(Callback, OurNames):
    """Writes one line per optimizer step to ``samples.jsonl``: its loss, and the samples of all ranks.

    A run that resumes from a checkpoint removes the lines of later steps, which it repeats, so the ledger equals that
    of a run that was never killed. It is written before each checkpoint, so it is never behind one.

    Args:
        dirpath: Folder of the ledger; by default the logger's folder, or the trainer's ``default_root_dir``.
        every_n_steps: Number of steps between two writes, for which ranks exchange their samples.
    """

    def __init__(self, dirpath: str | Path | None = None, every_n_steps: Count = 10) -> None:
        check_arguments(SampleLedger, locals())
        self.dirpath, self.every_n_steps = plain(dirpath), every_n_steps
        self._lock = FolderLock()
        self._lines: list[dict[str, Any]] = []  # of steps not written yet; without the samples of other ranks
        self._samples: list[list[list[str]]] = []  # of this rank, by step and micro-batch
        self._window: list[Batch] = []
        self._has_begun = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder and lock it for this process."""
        if stage == "fit":
            folder = trainer.strategy.broadcast(self.dirpath or trainer.log_dir or trainer.default_root_dir)
            self.path = Path(folder, LEDGER_FILE)
            self._lock.take(trainer, self.path.parent)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the folder.

        Raises:
            InputError: When a new run would overwrite a run that has finished steps.
        """
        self._lines, self._samples, self._window, self._has_begun = [], [], [], False
        first_rank_does(trainer, lambda: refuse_anew(trainer, self.path.parent))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember a micro-batch of the current step; before the first, remove the lines of steps to be repeated."""
        if not self._has_begun and trainer.is_global_zero:  # no other callback has refused the fit
            last = cut_off(self.path, trainer.global_step)
            if last < trainer.global_step:
                rank_zero_info(f"{self.path} has no lines of steps {last + 1} to {trainer.global_step}.")
        self._has_begun = True
        self._window.append(Batch.of(batch))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record a finished step."""
        if not is_between_steps(trainer):
            return
        window, self._window = self._window, []
        loss = trainer.callback_metrics.get("train/loss")
        self._samples.append([[name for name in one.provenance if name != "padding"] for one in window])
        self._lines.append(
            {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "micro_batch": batch_idx + 1 - len(window),
                "accumulate": trainer.accumulate_grad_batches,
                "seed": getattr(pl_module, "run_seed", None),
                "loss": None if loss is None else loss.item(),
                "normalizer": window[0].normalizer,
            }
        )
        if len(self._lines) >= self.every_n_steps:
            self._write(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the lines of all steps that the checkpoint includes, before it is saved."""
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the remaining lines."""
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the remaining lines after an error, on a single process only: other ranks may not respond."""
        if trainer.world_size == 1:
            with suppress(InputError):  # e.g. the full disk that ended the fit
                self._write(trainer)
        self._lock.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the lock on the folder."""
        self._lock.release()

    def _write(self, trainer: Trainer) -> None:
        lines, samples, self._lines, self._samples = self._lines, self._samples, [], []
        if not lines:  # on any rank
            return
        of_steps = zip(*gather(trainer, samples), strict=True)
        text = "".join(
            json.dumps({**line, "samples": of_step}, ensure_ascii=False) + "\n"
            for line, of_step in zip(lines, of_steps, strict=True)
        )
        first_rank_does(trainer, lambda: append(self.path, text))
