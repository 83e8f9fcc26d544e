"""Callbacks that the command line adds to ``fit``: checkpointing, graceful preemption, sample log, run record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint, ProgressBar
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.callbacks.checkpoint import BestCheckpoint, SafeCheckpoint
from lightning_sft.callbacks.keep_memory import KeepMemory
from lightning_sft.callbacks.ledger import SampleLedger
from lightning_sft.callbacks.preempt import Preempt
from lightning_sft.callbacks.progress import TrainingProgress
from lightning_sft.callbacks.record import RunRecord
from lightning_sft.callbacks.summary import RunSummary
from lightning_sft.checkpoints.reading import Checkpoint
from lightning_sft.checkpoints.run_files import refuse_finished
from lightning_sft.checkpoints.writing import folders_of, newest
from lightning_sft.io.address import is_address, place
from lightning_sft.types import InputError


def default_callbacks(trainer: Mapping[str, Any], resumes: bool, is_fit: bool = True) -> list[Callback]:
    """Default callbacks that the user has not given: memory, summary, progress, checkpoints, ….

    Verbs other than ``fit`` get only checkpointing and progress: Lightning warns if a checkpoint's callbacks are
    missing.

    Args:
        trainer: Settings of the trainer.
        resumes: Whether the root folder belongs to one run, which resumes in it; otherwise the logger makes a folder
            for each start.
        is_fit: Whether the verb is ``fit``.
    """
    given = trainer.get("callbacks") or []
    given = given if isinstance(given, list) else [given]
    added: list[Callback] = []
    if is_fit and not any(isinstance(callback, KeepMemory) for callback in given):
        added.append(KeepMemory())
    is_shown = not trainer.get("barebones")
    if is_shown and is_fit and trainer.get("enable_model_summary") is not False:
        added.append(RunSummary())
    has_bar = any(isinstance(callback, ProgressBar) for callback in given)
    if is_shown and trainer.get("enable_progress_bar") is not False and not has_bar:
        added.append(TrainingProgress())
    if trainer.get("fast_dev_run") or trainer.get("enable_checkpointing") is False or trainer.get("barebones"):
        return added
    if is_address(trainer.get("default_root_dir")):
        raise InputError(
            f"trainer.default_root_dir={trainer['default_root_dir']} is an address; the sample log, the record and the "
            "lock of a run need a local folder. Set the dirpath of the callback SafeCheckpoint to the address."
        )
    root = Path(trainer.get("default_root_dir") or ".")
    if is_fit and not any(isinstance(callback, Preempt) for callback in given):
        added.append(Preempt())
    of_run = str(root) if resumes else None
    for kind in (SampleLedger, RunRecord):
        own = [callback for callback in given if isinstance(callback, kind)]
        for callback in own:
            callback.dirpath = callback.dirpath or of_run
        if is_fit and not own:
            added.append(kind(of_run))
    folder = str((root / "checkpoints").expanduser().resolve()) if resumes else None
    savers = [callback for callback in given if isinstance(callback, ModelCheckpoint)]
    for saver in savers:
        if isinstance(saver, (SafeCheckpoint, BestCheckpoint)):
            saver.dirpath = saver.dirpath or folder
    if all(isinstance(saver, SafeCheckpoint) for saver in savers):
        added.append(BestCheckpoint(next((saver.dirpath for saver in savers), folder)))
    if not any(map(_saves_whole, given)):
        added.append(SafeCheckpoint(folder))
    return added


def _saves_whole(callback: Callback) -> bool:
    """Whether a callback saves checkpoints during training that a run can resume from."""
    if isinstance(callback, ModelCheckpoint):
        return not callback.save_weights_only and (callback.save_top_k != 0 or bool(callback.save_last))
    return isinstance(callback, CheckpointCallback) and not isinstance(callback, OnExceptionCheckpoint)


def find_last(root: str | None, callbacks: Any, pretrained: str | None, is_fit: bool) -> str | None:
    """The newest valid checkpoint of a run, or ``None`` if a fit has none yet; a fit ignores weights-only checkpoints.

    Args:
        root: The trainer's ``default_root_dir``.
        callbacks: Callbacks of the config, whose ``dirpath`` is searched.
        pretrained: The run's ``model.pretrained``, which the checkpoint must match.
        is_fit: Whether the verb is ``fit``, which may start without a checkpoint.

    Raises:
        InputError: When there is no checkpoint and the run cannot start without one, or it is from another run.
    """
    own = [_dirpath(callback) for callback in (callbacks if isinstance(callbacks, list) else [callbacks])]
    folders = [*(place(path) for path in own if path), *folders_of(root or ".")]
    path = newest(folders, resumable=is_fit)
    if path is None:
        if not is_fit:
            raise InputError(f"ckpt_path=last: there is no checkpoint in {', '.join(map(str, folders))}.")
        refuse_finished(Path(root or "."), folders)
        rank_zero_info(f"ckpt_path=last: there is no checkpoint below {root or '.'} yet, so the run starts at step 0.")
        return None
    of = Checkpoint(path).hyper_parameters.get("pretrained")
    if of and pretrained and of != pretrained and Path(of).resolve() != Path(pretrained).resolve():
        raise InputError(
            f"ckpt_path=last is {path}, from a run with model.pretrained={of}, now {pretrained}. Give this run a "
            "separate folder (trainer.default_root_dir), or set ckpt_path to the checkpoint."
        )
    return str(path)


def _dirpath(callback: Any) -> str | None:
    settings = getattr(callback, "init_args", None)
    found = None if settings is None else settings.get("dirpath")
    return str(found) if found else None
