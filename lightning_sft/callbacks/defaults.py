"""What the command line adds to ``fit``: a run survives the end of its process, finds its place again, and is fast."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint, ProgressBar
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.callbacks.checkpoint import SafeCheckpoint
from lightning_sft.callbacks.keep_memory import KeepMemory
from lightning_sft.callbacks.ledger import SampleLedger
from lightning_sft.callbacks.preempt import Preempt
from lightning_sft.callbacks.progress import TrainingProgress
from lightning_sft.callbacks.record import RunRecord
from lightning_sft.checkpoints.reading import Checkpoint
from lightning_sft.checkpoints.run_files import refuse_finished
from lightning_sft.checkpoints.writing import folders_of, newest
from lightning_sft.types import InputError


def default_callbacks(trainer: Mapping[str, Any], goes_on: bool, is_fit: bool = True) -> list[Callback]:
    """Those that the user has not given: kept memory, checkpoints, an end in good order, and the ledger.

    Verbs other than fit have checkpoints alone: Lightning warns where a checkpoint's callbacks are not there.

    Args:
        trainer: Settings of the trainer.
        goes_on: Whether the root folder is that of one run, which goes on in it. Else a logger makes one for each.
        is_fit: Whether it is going to train.
    """
    given = trainer.get("callbacks") or []
    given = given if isinstance(given, list) else [given]
    added: list[Callback] = []
    if is_fit and not any(isinstance(callback, KeepMemory) for callback in given):
        added.append(KeepMemory())
    if trainer.get("fast_dev_run") or trainer.get("enable_checkpointing") is False or trainer.get("barebones"):
        return added
    root = Path(trainer.get("default_root_dir") or ".")
    if is_fit and not any(isinstance(callback, Preempt) for callback in given):
        added.append(Preempt())
    for kind in (SampleLedger, RunRecord):
        if is_fit and not any(isinstance(callback, kind) for callback in given):
            added.append(kind(str(root) if goes_on else None))
    if trainer.get("enable_progress_bar") is not False and not any(isinstance(own, ProgressBar) for own in given):
        added.append(TrainingProgress())
    if not any(map(_saves_whole, given)):
        added.append(SafeCheckpoint(str(root / "checkpoints") if goes_on else None))
    return added


def _saves_whole(callback: Callback) -> bool:
    """Whether a run can resume from what a callback saves while it trains."""
    if isinstance(callback, ModelCheckpoint):
        return not callback.save_weights_only and (callback.save_top_k != 0 or bool(callback.save_last))
    return isinstance(callback, CheckpointCallback) and not isinstance(callback, OnExceptionCheckpoint)


def find_last(root: str | None, callbacks: Any, pretrained: str | None, is_fit: bool) -> str | None:
    """The newest good checkpoint of a run; ``None`` where a fit has none yet. A fit takes none of the weights alone.

    Args:
        root: The trainer's ``default_root_dir``.
        callbacks: Of the config: those that save have a ``dirpath``.
        pretrained: What the run starts from: a checkpoint of another model is not its own.
        is_fit: Whether a run may begin.

    Raises:
        InputError: When there is none, and none can be made; or it is of another run.
    """
    own = [_dirpath(callback) for callback in (callbacks if isinstance(callbacks, list) else [callbacks])]
    folders = [*(Path(path) for path in own if path), *folders_of(root or ".")]
    path = newest(folders, resumable=is_fit)
    if path is None:
        if not is_fit:
            raise InputError(f"ckpt_path=last: there is no checkpoint in {', '.join(map(str, folders))}.")
        refuse_finished(Path(root or "."), folders)
        rank_zero_info(f"ckpt_path=last: there is no checkpoint below {root or '.'} yet, so the run begins.")
        return None
    of = Checkpoint(path).hyper_parameters.get("pretrained")
    if None not in (of, pretrained) and of != pretrained:
        raise InputError(
            f"ckpt_path=last is {path}, of a run of model.pretrained={of}, now {pretrained}. Give this run a folder of "
            "its own (trainer.default_root_dir), or name the checkpoint."
        )
    return str(path)


def _dirpath(callback: Any) -> str | None:
    settings = getattr(callback, "init_args", None)
    found = None if settings is None else settings.get("dirpath")
    return str(found) if found else None
