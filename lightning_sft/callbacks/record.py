"""The record of a run, from which ``lightning-sft report`` makes its page, independent of the logger."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from lightning_sft.callbacks.checkpoint import finish_saves
from lightning_sft.callbacks.ending import why_ended
from lightning_sft.callbacks.preempt import Preempted
from lightning_sft.checkpoints.run_files import METRICS_FILE, RECORD_FILE, cut_off, lines_of, record_of, refuse_anew
from lightning_sft.checkpoints.run_info import run_info
from lightning_sft.checkpoints.run_lock import FolderLock
from lightning_sft.data.inspect.summary import counts, histogram, targets_in_words
from lightning_sft.io.arguments import Count, check_arguments, plain
from lightning_sft.io.disk import append, write
from lightning_sft.io.named import OurNames
from lightning_sft.module import SFTModule
from lightning_sft.training.trainer import (
    callbacks_of,
    datamodule_of,
    first_rank_does,
    is_between_steps,
    logged_in_training,
)
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from lightning_sft.datamodule import SFTDataModule


class RunRecord(Callback, OurNames):
    """Writes ``run.json``, which describes the run, and ``metrics.jsonl``, the metrics of each step and validation.

    A run that resumes from a checkpoint removes the lines of later steps, which it repeats.

    Args:
        dirpath: Folder of the two files; by default the logger's folder, or the trainer's ``default_root_dir``.
        every_n_steps: Number of optimizer steps between two recorded steps.
        flush_every: Number of recorded steps whose metrics stay on the device before they are written together.
    """

    def __init__(self, dirpath: str | Path | None = None, every_n_steps: Count = 1, flush_every: Count = 20) -> None:
        check_arguments(RunRecord, locals())
        self.dirpath, self.every_n_steps, self.flush_every = plain(dirpath), every_n_steps, flush_every
        self._lines: list[tuple[dict[str, float], dict[str, Tensor]]] = []
        self._untrained: dict[str, Tensor] = {}  # metrics of the pretrained model
        self._lock, self._record = FolderLock(), dict[str, Any]()
        self._planned: dict[str, Any] = {}  # the record of a fit that has not begun
        self._is_saving, self._has_begun = False, True
        self._validated: int | None = None  # step whose validation is already recorded, which a resumed run repeats

    def folder(self, trainer: Trainer) -> Path:
        """The folder of the files; every rank must call this."""
        return Path(trainer.strategy.broadcast(self.dirpath or trainer.log_dir or trainer.default_root_dir))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder and lock it for this process."""
        if stage == "fit":
            self._folder = self.folder(trainer)
            self._lock.take(trainer, self._folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Describe the run; nothing is written yet, since another callback may refuse the fit.

        Raises:
            InputError: When a new run would overwrite a run that has finished steps.
        """
        self._lines, self._begin, self._record, self._is_saving = [], time.time(), {}, False
        first_rank_does(trainer, lambda: refuse_anew(trainer, self._folder))
        self._has_begun = False
        facts, logged = run_info(trainer), trainer.log_dir  # collective
        self._config, self._validated = Path(logged or ".", "config.yaml"), None
        if not trainer.is_global_zero:
            return
        before = record_of(self._folder) if trainer.global_step else {}
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": trainer.global_step,
            "command": sys.argv,
            "device": _device(trainer),
        }
        self._planned = {
            "starts": [*before.get("starts", []), start],
            "saved": bool(trainer.global_step),
            "pretrained": getattr(pl_module, "pretrained", None),
            "config": None,
            "loss": _loss(pl_module),
            "parameters": sum(p.numel() for p in pl_module.parameters()),
            "trained": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "facts": facts,
            "data": _data(datamodule_of(trainer)),
        }

    def _start(self, trainer: Trainer) -> None:
        if not self._has_begun:
            self._has_begun = True
            first_rank_does(trainer, lambda: self._write_start(trainer))

    def _write_start(self, trainer: Trainer) -> None:
        """Write the description, and remove the lines of steps that will be repeated."""
        metrics = self._folder / METRICS_FILE
        if cut_off(metrics, trainer.global_step) == trainer.global_step and metrics.exists():
            last = [line for line, _ in lines_of(metrics) if line["step"] == trainer.global_step]
            self._validated = trainer.global_step if any("train/loss" not in line for line in last) else None
        self._record, self._planned = self._planned, {}
        if self._config.is_file():
            self._record["config"] = self._config.read_text(encoding="utf-8")
        self._write_record()
        if not trainer.global_step:
            self._add(trainer, self._untrained)
        self._untrained = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the description before the first validation, which may precede the first batch of a resumed run."""
        if not trainer.sanity_checking:
            self._start(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the description before the first batch.

        When the first checkpoint is saved, record that: from now on, no other run may start in this folder.
        """
        self._start(trainer)
        if self._is_saving and not any(getattr(saver, "is_saving", False) for saver in trainer.checkpoint_callbacks):
            self._has_saved()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the metrics of a finished step."""
        if not is_between_steps(trainer) or trainer.global_step % self.every_n_steps:
            return
        if trainer.is_global_zero:
            logged = logged_in_training(trainer)  # the user's own, too
            self._note(trainer, lambda name: name in logged)
        if trainer.global_step // self.every_n_steps % self.flush_every == 0:
            first_rank_does(trainer, self._write)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics of a validation, also of a complete sanity check (``num_sanity_val_steps=-1``)."""
        if trainer.sanity_checking and trainer.num_sanity_val_steps == math.inf and not trainer.global_step:
            self._untrained = {name: value.detach().clone() for name, value in trainer.callback_metrics.items()}
        is_new = not trainer.sanity_checking and trainer.global_step != self._validated
        if trainer.is_global_zero and trainer.state.fn == "fit" and is_new:
            self._note(trainer, lambda name: not (name == "lr" or name.startswith("train/")))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the lines of all steps that the checkpoint includes, before it is saved."""
        first_rank_does(trainer, self._write)
        self._is_saving = bool(self._record) and not self._record["saved"]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the remaining lines, and why training ended."""
        finish_saves(trainer)
        if trainer.is_global_zero and not sum(trainer.num_val_batches):
            self._note(trainer, lambda name: name.startswith("drift/"))

        def end() -> None:
            self._write()
            self._end(trainer, why_ended(trainer), has_saved=self._is_saving)

        first_rank_does(trainer, end)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the remaining lines, and the exception that ended training."""
        self._planned = {}
        with suppress(InputError):  # e.g. the full disk that ended the fit
            self._write()
            has_saved = self._is_saving and isinstance(exception, Preempted)
            self._end(trainer, f"{type(exception).__name__}: {exception}", has_saved)
        self._lock.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the lock on the folder."""
        self._lock.release()

    def _has_saved(self) -> None:
        self._is_saving, self._record["saved"] = False, True
        with suppress(InputError):  # of a full disk, on this rank alone: it is written again at the end
            self._write_record()

    def _end(self, trainer: Trainer, reason: str, has_saved: bool) -> None:
        if self._record:
            self._record["starts"][-1]["end"] = {"step": trainer.global_step, "reason": reason}
            self._record["saved"] |= has_saved
            self._write_record()
            self._record = {}

    def _write_record(self) -> None:
        write(self._folder / RECORD_FILE, json.dumps(self._record, ensure_ascii=False, indent=1))

    def _note(self, trainer: Trainer, is_wanted: Callable[[str], bool]) -> None:
        self._add(trainer, {name: value for name, value in trainer.callback_metrics.items() if is_wanted(name)})

    def _add(self, trainer: Trainer, chosen: dict[str, Tensor]) -> None:
        if not chosen:
            return
        at = {"step": trainer.global_step, "epoch": trainer.current_epoch, "seconds": time.time() - self._begin}
        self._lines.append((at, {name: value.detach().float() for name, value in chosen.items()}))

    def _write(self) -> None:
        lines, self._lines = self._lines, []
        if not lines:
            return
        rows = [{**at, **{name: value.item() for name, value in values.items()}} for at, values in lines]
        short = [{n: float(f"{v:.7g}") if isinstance(v, float) else v for n, v in row.items()} for row in rows]
        append(self._folder / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in short))


def folder_of(trainer: Trainer) -> Path:
    """The folder of a run, where its record is or its logger writes; every rank must call this."""
    records = [callback for callback in callbacks_of(trainer) if isinstance(callback, RunRecord)]
    return (records[0] if records else RunRecord()).folder(trainer)


def _loss(module: LightningModule) -> dict[str, str]:
    """What the training loss of a module is: whose, and what it is divided by."""
    kind = type(module)
    names = ("target_loss", "forward", "training_step")
    own = [name for name in names if getattr(kind, name, None) is not getattr(SFTModule, name)]
    normalize = str(getattr(module, "normalize", "by the module itself"))
    return {"of": f"{kind.__name__}.{own[0]}" if own else "−log Pr", "normalize": normalize}


def _device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{trainer.world_size} × {name}"


def _data(datamodule: LightningDataModule | None) -> dict[str, Any] | None:
    """The data module's report, or ``None`` if it has none."""
    data = cast("SFTDataModule", datamodule)
    splits = getattr(data, "splits", None)
    if not splits:
        return None
    shown: dict[str, Any] = {"splits": {name: counts(split) for name, split in splits.items()}}
    shown["remarks"] = [text for name, split in splits.items() for text in split.account.remarks(name)]
    if "train" in splits:
        shown |= {"histogram": histogram(splits["train"].lengths, 24), "targets": targets_in_words(splits["train"])}
        if not data.streaming:
            planned = data.planned("train")
            shown |= {"epoch": str(planned), "mixture": planned.mixture}
    return shown
