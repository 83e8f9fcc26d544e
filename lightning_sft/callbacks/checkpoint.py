"""Checkpoints written atomically: the last few, to resume from, and the best weights."""

from __future__ import annotations

import math
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast
from weakref import proxy

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Optimizer

from lightning_sft.callbacks.saving import check_states, save_in_background, save_whole
from lightning_sft.checkpoints.background import BackgroundWriter, refuse_async_io, refuse_own_writer
from lightning_sft.checkpoints.run_lock import FolderLock
from lightning_sft.checkpoints.writing import (
    bytes_of_checkpoint,
    check_disk,
    folders_of,
    newest,
    remove_checkpoint,
    step_of,
    sweep,
    why_unreadable,
    write_whole,
)
from lightning_sft.io.address import Address, Place, place
from lightning_sft.io.arguments import Count, NonNegative, check_arguments, plain
from lightning_sft.io.named import OurNames
from lightning_sft.training.trainer import (
    Agreement,
    averages_weights,
    callbacks_of,
    first_rank_does,
    how_to_resume,
    is_between_steps,
)
from lightning_sft.types import InputError

_NAME = "resume-{epoch}-{step}"
_PATTERN = "resume-*.ckpt"


class SafeCheckpoint(ModelCheckpoint, OurNames):
    """Saves checkpoints to resume from: at the end of each epoch, and within an epoch by steps or by time.

    A crash or a full disk never leaves a partial checkpoint under a final name. ``ckpt_path="last"`` is the newest
    valid one in the folder. :class:`BestCheckpoint` keeps the best weights beside them.

    Args:
        dirpath: Folder of the checkpoints, not shared with other runs; by default the logger's. An address that fsspec
            knows (``s3://bucket/run``) works, too, but has no lock that keeps out other runs.
        every_n_train_steps: Number of optimizer steps between two checkpoints; ``null`` saves by time only.
        every_n_minutes: Minutes between two checkpoints; ``null`` saves by steps only.
        keep_last: Number of most recent checkpoints to keep.
        in_background: Whether a thread copies checkpoints to host memory and writes them while training continues: only
            the next optimizer step waits for the copy. It needs room there for one checkpoint; a second one waits until
            the first is on disk.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        every_n_train_steps: Count | None = None,
        every_n_minutes: NonNegative | None = 30.0,
        keep_last: Count = 2,
        in_background: bool = False,
    ) -> None:
        check_arguments(SafeCheckpoint, locals())
        where = str(dirpath).removeprefix("file://") if dirpath else None
        super().__init__(plain(where), _NAME, save_top_k=1, enable_version_counter=False)
        self.every_n_steps, self.every_n_minutes, self.keep_last = every_n_train_steps, every_n_minutes, keep_last
        self.in_background = in_background
        self._last_time, self._agreement, self._lock = 0.0, Agreement(), FolderLock()
        self._writer: BackgroundWriter | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder and lock it for this process."""
        super().setup(trainer, pl_module, stage)
        refuse_async_io(trainer.strategy)
        if isinstance(self._folder, Address):
            refuse_own_writer(trainer.strategy, f"SafeCheckpoint(dirpath={str(self._folder)!r})")
        write_whole(trainer)
        if stage == "fit":
            # Lightning's ckpt_path="best" asks the first saver alone, and this one knows the newest, not the best
            cast(Any, trainer).callbacks = [own for own in callbacks_of(trainer) if own is not self] + [self]
            if isinstance(self._folder, Path):
                self._lock.take(trainer, self._folder)
            self._writer = BackgroundWriter(trainer.strategy) if self.in_background else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the folder and the disk, and remove partial checkpoints of killed processes.

        Raises:
            InputError: When the folder holds checkpoints of another run, the disk has no room for a checkpoint, or a
                callback has a state that no run could resume from.
        """
        self._last_time, self._agreement = time.monotonic(), Agreement()
        self._last_global_step_saved = trainer.global_step  # what was resumed from need not be written again
        first_rank_does(trainer, lambda: self._check(trainer, pl_module))
        check_states(trainer)

    def _check(self, trainer: Trainer, module: LightningModule) -> None:
        folder, resumed_from = self._folder, trainer.ckpt_path
        others = sorted((path for path in folder.glob(_PATTERN) if step_of(path) is not None), key=str)
        folders = [getattr(saver, "dirpath", None) for saver in trainer.checkpoint_callbacks]
        own = {place(found).resolve() for found in folders if found}
        if others and resumed_from is None:
            if reason := why_unreadable(others):
                raise InputError(
                    f"{folder} holds checkpoints, but none of them can be read, so no run can resume there. {reason} "
                    "Give this run a separate folder (trainer.default_root_dir), or move them away."
                )
            raise InputError(
                f"{folder} holds the checkpoints of another run, such as {others[-1].name}. Resume that run "
                f"({how_to_resume(trainer)}), or give this one a separate folder (trainer.default_root_dir)."
            )
        if others and place(str(resumed_from)).resolve().parent not in own:
            raise InputError(
                f"{folder} holds the checkpoints of another run, such as {others[-1].name}; this one resumes from "
                f"{resumed_from}. Give it a separate folder (trainer.default_root_dir), or move the others away."
            )
        sweep(folder, "*.ckpt*")
        if isinstance(folder, Path):
            check_disk(folder, bytes_of_checkpoint(module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Finish the checkpoint being written, and release the lock on the folder."""
        super().on_exception(trainer, pl_module, exception)
        error = self._writer and self._writer.wait()
        if error is not None:  # beside the one that has ended the fit
            warnings.warn(str(error), stacklevel=2)
        self._release()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the checkpoint being written."""
        self.finish(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the lock on the folder."""
        self._release()

    def _release(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        self._lock.release()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between two optimizer steps when a checkpoint is due."""
        if not is_between_steps(trainer):
            return
        if self._writer is not None and self._writer.has_ended and not self._writer.has_failed:
            self._collect(trainer, self._writer)
        if self._is_due(trainer):
            self._begin_to_save(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Wait until the checkpoint is copied, since the step changes what is copied."""
        self._wait_for_copy()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait until the checkpoint is copied, since a validation may be of other weights, such as averaged ones."""
        self._wait_for_copy()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the end of the epoch follows."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch, and of training."""
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save now, unless this step is already saved; every process must call this.

        In the background, the checkpoint is copied on return, but not yet written.

        Raises:
            InputError: When it, or the one before it in the background, cannot be written.
        """
        self._begin_to_save(trainer)
        self._wait_for_copy()

    def _begin_to_save(self, trainer: Trainer) -> None:
        self.finish(trainer)
        if self._should_skip_saving_checkpoint(trainer):
            return
        self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))
        self._last_time = time.monotonic()

    def _wait_for_copy(self) -> None:
        if self._writer is not None:
            self._writer.wait_for_copy()

    def finish(self, trainer: Trainer) -> None:
        """Wait for the checkpoint being written in the background, if any; every process must call this.

        Raises:
            InputError: When it cannot be written.
        """
        if self._writer is None:
            return
        error = self._collect(trainer, self._writer)
        message: str | None = trainer.strategy.broadcast(None if error is None else str(error))
        if message is not None:
            raise InputError(message) from error

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is being written in the background, or failed to be."""
        return self._writer is not None and self._writer.path is not None

    def _collect(self, trainer: Trainer, writer: BackgroundWriter) -> InputError | None:
        path = writer.path
        error = writer.wait()
        if path is not None and error is None:
            _has_saved(self, trainer, str(path))
        return error

    def _remove_old(self, now: int, resumed_from: Any) -> None:
        """Remove all but the last few checkpoints, and the one the run was resumed from.

        Checkpoints are ordered by step. Those of later steps than the current one were saved before the run went back
        to an earlier checkpoint; its steps are repeated, so they are removed first.
        """
        resumed_from = place(resumed_from).resolve() if resumed_from else None
        steps = {path: step for path in self._folder.glob(_PATTERN) if (step := step_of(path)) is not None}
        by_age = sorted(steps, key=lambda path: (steps[path] <= now, steps[path], path.name))
        for path in by_age[: -self.keep_last]:
            if path.resolve() != resumed_from:
                remove_checkpoint(path)

    @property
    def _folder(self) -> Place:
        return place(str(self.dirpath))

    def _is_due(self, trainer: Trainer) -> bool:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            return True
        if self.every_n_minutes is None and self._writer is None:
            return False
        has_failed = self._writer is not None and self._writer.has_failed  # then `save` raises its error
        minutes = math.inf if self.every_n_minutes is None else self.every_n_minutes
        is_late = time.monotonic() - self._last_time >= 60 * minutes
        return self._agreement.one_says(trainer, has_failed or (is_late and trainer.is_global_zero))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        remove_old = partial(self._remove_old, trainer.global_step, trainer.ckpt_path)
        if self._writer is not None:
            save_in_background(trainer, filepath, self._writer, remove_old)
        else:
            save_whole(trainer, filepath)
            _has_saved(self, trainer, filepath)
            if trainer.is_global_zero:
                remove_old()
        self._last_global_step_saved = trainer.global_step

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        return False  # done by `save`

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        found = newest([str(self.dirpath)] if self.dirpath else folders_of(trainer.default_root_dir))
        return set() if found is None else {str(found)}


class BestCheckpoint(ModelCheckpoint, OurNames):
    """Keeps the weights of the best validation in ``best.ckpt``, beside the checkpoints to resume from.

    They serve ``test``, ``chat`` and ``export``; no run can resume from them. A fit that does not log the metric, since
    it has no validation data, keeps none.

    Args:
        dirpath: Folder of the checkpoint; by default the logger's.
        monitor: Metric by which validations are compared, such as ``val/loss``.
        mode: Whether the lowest or the highest value of the metric is the best.
    """

    def __init__(
        self, dirpath: str | Path | None = None, monitor: str = "val/loss", mode: Literal["min", "max"] = "min"
    ) -> None:
        check_arguments(BestCheckpoint, locals())
        super().__init__(
            plain(dirpath),
            "best",
            monitor=monitor,
            mode=mode,
            save_weights_only=True,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder.

        Raises:
            InputError: When another one saves there.
        """
        super().setup(trainer, pl_module, stage)
        write_whole(trainer)
        savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, BestCheckpoint)]
        if any(saver is not self and saver.dirpath == self.dirpath for saver in savers):
            raise InputError(f"Two BestCheckpoint save {self.dirpath}/best.ckpt. Give each a separate dirpath.")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if this validation is the best so far."""
        if self.monitor in trainer.callback_metrics:
            super().on_validation_end(trainer, pl_module)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        # Averages are saved by their callback, which Lightning calls for full checkpoints alone.
        save_whole(trainer, filepath, weights_only=not averages_weights(callbacks_of(trainer)))
        self._last_global_step_saved = trainer.global_step
        _has_saved(self, trainer, filepath)


def _has_saved(saver: ModelCheckpoint, trainer: Trainer, path: str) -> None:
    """Note the path of a checkpoint, and tell the loggers, some of which upload it."""
    saver._last_checkpoint_saved = path
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.after_save_checkpoint(proxy(saver))


def finish_saves(trainer: Trainer) -> None:
    """Wait for checkpoints being written in the background; every process must call this.

    Raises:
        InputError: When one cannot be written.
    """
    for saver in trainer.checkpoint_callbacks:
        if isinstance(saver, SafeCheckpoint):
            saver.finish(trainer)
