"""Preemption: on SIGTERM, Ctrl-C or SLURM's advance signal, a run saves a checkpoint and exits."""

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

from lightning_sft.callbacks.checkpoint import SafeCheckpoint
from lightning_sft.callbacks.saving import save_whole
from lightning_sft.checkpoints.writing import write_whole
from lightning_sft.data.batches.loader import EpochLoader
from lightning_sft.io.arguments import check_arguments
from lightning_sft.io.named import OurNames
from lightning_sft.training.trainer import Agreement, callbacks_of, how_to_resume, is_between_steps
from lightning_sft.types import InputError

EX_TEMPFAIL = 75
"""Exit code for a temporary failure, to be retried; the name is that of ``sysexits.h``."""

SIGNALS = tuple(name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))  # Windows has no SIGUSR1

_INTERRUPTED = b"\nInterrupted: saving a checkpoint after this step.\nPress Ctrl-C again to end at once, without one.\n"


class Preempted(SystemExit):
    """Training was interrupted by a signal and can be resumed."""

    def __init__(self, reason: str = "preempted") -> None:
        super().__init__(EX_TEMPFAIL)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class Preempt(Callback, OurNames):
    """On a signal or Ctrl-C, saves a checkpoint after the current optimizer step and exits with code 75.

    The signal may reach one process or all. The handler only records it; at the end of each step the processes agree
    whether any of them received one. Lightning's own handlers broadcast at once, possibly in the middle of another
    collective, which makes a run of two processes hang. A validation is interrupted between batches. A second Ctrl-C
    ends the process at once, without a checkpoint.

    The callback moves to the end of ``trainer.callbacks``, so all other callbacks have seen the step when it exits.

    Args:
        signals: Names of the signals to handle: ``SIGUSR1`` for SLURM's ``--signal=USR1``, ``SIGINT`` for Ctrl-C.
    """

    def __init__(self, signals: Sequence[str] = SIGNALS) -> None:
        check_arguments(Preempt, locals())
        known = signal.Signals.__members__
        if unknown := [name for name in signals if name not in known]:
            raise InputError(f"Unknown signal {', '.join(unknown)}. Expected names such as SIGTERM or SIGUSR1.")
        self.signals = [known[name] for name in signals]
        self.told: str | None = None  # name of the received signal
        self._agreement, self._process, self._is_first_rank = Agreement(), 0, True
        self._before: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move behind all other callbacks."""
        others = [callback for callback in callbacks_of(trainer) if callback is not self]
        cast(Any, trainer).callbacks = [*others, self]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers; Lightning restores its own when the fit ends."""
        self.told, self._agreement = None, Agreement()
        self._process, self._is_first_rank = os.getpid(), trainer.is_global_zero
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take_note) for number in self.signals}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the previous signal handlers."""
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and exit between two optimizer steps, if any process received a signal."""
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
        """Save and exit during a validation in which all processes are known to have equally many batches."""
        known = trainer.world_size == 1 or isinstance(trainer.val_dataloaders, EpochLoader)
        may_end = known and trainer.state.fn == "fit" and not trainer.sanity_checking
        if may_end and self._agreement.one_says(trainer, self.told is not None):
            self._end(trainer)

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker process, which inherited the handler by fork
            return
        self.told = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C ends the process even if it waits for others
            if self._is_first_rank:
                os.write(2, _INTERRUPTED)  # print must not be called in a handler

    def _end(self, trainer: Trainer) -> None:
        path, told = self._save(trainer), self.told or "a signal on another rank"
        finds = any(isinstance(saver, SafeCheckpoint) for saver in trainer.checkpoint_callbacks)
        how = how_to_resume(trainer, "last" if finds else path)
        saved = f"saved step {trainer.global_step} to {path}. Resume with {how}."
        nothing = "nothing was saved, since no step was finished. Run the same command to start again."
        rank_zero_info(f"Received {told}; {nothing if path is None else saved}")
        raise Preempted(f"received {told}")

    def _save(self, trainer: Trainer) -> str | None:
        savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        safe = [saver for saver in savers if isinstance(saver, SafeCheckpoint)]
        if safe:
            safe[0].save(trainer)
            safe[0].finish(trainer)
            saved = safe[0]._last_checkpoint_saved or trainer.ckpt_path
            return str(saved) if saved else None
        write_whole(trainer)
        folder = next((saver.dirpath for saver in savers if saver.dirpath), None)
        path = Path(folder or Path(trainer.default_root_dir, "checkpoints"), f"resume-step={trainer.global_step}.ckpt")
        save_whole(trainer, path)
        return str(path)
