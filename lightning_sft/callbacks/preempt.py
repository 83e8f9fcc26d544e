"""Preemption: on SIGTERM, Ctrl-C or the signal that SLURM sends ahead, a run saves where it is and ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.callbacks.checkpoint import SafeCheckpoint, save_whole
from lightning_sft.checkpoints.writing import write_whole
from lightning_sft.data.batches.loader import EpochLoader
from lightning_sft.io.arguments import check_arguments
from lightning_sft.training.trainer import Agreement, callbacks_of, is_between_steps
from lightning_sft.types import InputError

EX_TEMPFAIL = 75
"""Exit code that says: try again. It is what ``sysexits.h`` calls it."""

SIGNALS = tuple(name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))  # Windows has no SIGUSR1

_INTERRUPTED = b"\nInterrupted: saving a checkpoint after this step. Press Ctrl-C again to end at once, without one.\n"


class Preempted(SystemExit):
    """The training was told to end, has saved where it is, and can resume there."""

    def __init__(self, reason: str = "told to end") -> None:
        super().__init__(EX_TEMPFAIL)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class Preempt(Callback):
    """On a signal or Ctrl-C, saves a checkpoint after the optimizer step under way, and exits with code 75.

    The signal may reach one process or all. A handler only takes note of it; at the end of each step the processes
    agree whether one of them has been told. Lightning's own handlers broadcast at once, which can be in the middle of
    another exchange, so that a run of two processes hangs. During a validation it need not wait for the end. A second
    Ctrl-C ends the process at once, without a checkpoint.

    It moves to the end of ``trainer.callbacks``: when it ends the run, all others have seen the step.

    Args:
        signals: Their names. SLURM's ``--signal`` sends what it is told to, as ``USR1``; Ctrl-C is ``SIGINT``.
    """

    def __init__(self, signals: Sequence[str] = SIGNALS) -> None:
        check_arguments(Preempt, locals())
        known = signal.Signals.__members__
        if unknown := [name for name in signals if name not in known]:
            raise InputError(f"There is no signal {', '.join(unknown)}. Expected names such as SIGTERM or SIGUSR1.")
        self.signals = [known[name] for name in signals]
        self.told: str | None = None  # by which signal
        self._agreement, self._process, self._is_first_rank = Agreement(), 0, True
        self._before: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand behind all other callbacks."""
        others = [callback for callback in callbacks_of(trainer) if callback is not self]
        cast(Any, trainer).callbacks = [*others, self]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which gives them back when the fit ends."""
        self.told, self._agreement = None, Agreement()
        self._process, self._is_first_rank = os.getpid(), trainer.is_global_zero
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take_note) for number in self.signals}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End here, between two optimizer steps, if a process has been told to."""
        if is_between_steps(trainer) and self._agreement.one_says(trainer, self.told is not None):
            self._end(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """The same in a validation, where all processes are known to have equally many batches."""
        known = trainer.world_size == 1 or isinstance(trainer.val_dataloaders, EpochLoader)
        may_end = known and trainer.state.fn == "fit" and not trainer.sanity_checking
        if may_end and self._agreement.one_says(trainer, self.told is not None):
            self._end(trainer)

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker process that was forked with this handler
            return
        self.told = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process, even where it waits for others
            if self._is_first_rank:
                os.write(2, _INTERRUPTED)  # print must not be called in a handler

    def _end(self, trainer: Trainer) -> None:
        path, told = self._save(trainer), self.told or "a signal on another rank"
        saved = f"saved step {trainer.global_step} to {path}. Resume with --ckpt_path last."
        nothing = "nothing was saved, since no step has been taken. The same command begins again."
        rank_zero_info(f"Received {told}; {nothing if path is None else saved}")
        raise Preempted(f"received {told}")

    def _save(self, trainer: Trainer) -> Path | None:
        savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        safe = [saver for saver in savers if isinstance(saver, SafeCheckpoint)]
        if safe:
            safe[0].save(trainer)
            saved = safe[0]._last_checkpoint_saved or trainer.ckpt_path
            return Path(saved) if saved else None
        write_whole(trainer)
        folder = next((saver.dirpath for saver in savers if saver.dirpath), None)
        path = Path(folder or Path(trainer.default_root_dir, "checkpoints"), f"resume-step={trainer.global_step}.ckpt")
        save_whole(trainer, path)
        return path
