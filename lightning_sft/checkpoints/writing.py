"""The checkpoints of a run on disk: written whole or not at all, and the newest good one found."""

from __future__ import annotations

import math
import re
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.checkpoints.reading import Checkpoint, know_optimizer_states
from lightning_sft.checkpoints.resume import POSITION_KEY, SHARDED_KEY
from lightning_sft.io.disk import PARTIAL, hidden, publish, remove
from lightning_sft.types import InputError


class AtomicIO(TorchCheckpointIO):
    """Writes checkpoints whole, and reads quantized states of optimizers.

    Lightning's own way goes by the folder for temporary files, often of another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write it under another name, to the disk, and rename it."""
        if "://" in str(path) or storage_options is not None:  # not a disk: left to Lightning
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with hidden(path).open("wb") as file:
                torch.save(checkpoint, file)
            publish(path)
        except (OSError, RuntimeError) as error:  # torch.save has errors of its own for a full disk
            remove(hidden(path))
            raise InputError(
                f"The checkpoint {path} cannot be written: {error}. Those before it are intact."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Load it on the CPU: of states that are tensors of a class of their own, torch refuses a callable location.

        Of a folder that a strategy which shards the model has written, the weights and the facts.

        Raises:
            InputError: When it is no checkpoint of Lightning.
        """
        if "://" not in str(path):
            if Path(path).is_dir():
                return Checkpoint(path).whole() | {SHARDED_KEY: True}
            know_optimizer_states(path)
        found: Any = super().load_checkpoint(path, map_location, weights_only)
        if not isinstance(found, dict) or "pytorch-lightning_version" not in found:
            what = (
                f"a dictionary of {', '.join(map(str, list(found)[:5]))}"
                if isinstance(found, dict)
                else "no dictionary"
            )
            raise InputError(f"{path} is no checkpoint of Lightning, but {what}. Expected what a fit has saved.")
        return found


def write_whole(trainer: Trainer) -> None:
    """Have all checkpoint files of a trainer written and read our way, also those of Lightning's ModelCheckpoint."""
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicIO()


def newest(folders: Iterable[str | Path], *, resumable: bool = True) -> Path | None:
    """The checkpoint of the latest step; those that cannot be read are skipped with a warning.

    The step is read in the checkpoints; the clock, which may have been set back, is not asked. Folders that a logger
    has numbered (``version_3``) are of runs of their own: they come after all others, and the highest number first.

    Args:
        folders: Where to look; they need not exist.
        resumable: Leave out checkpoints of the weights alone, from which no run can resume.
    """
    runs: dict[float, list[Path]] = {}
    for folder in dict.fromkeys(map(Path, folders)):
        runs.setdefault(_number_of(folder), []).extend(sorted(folder.glob("*.ckpt")))
    for _, paths in sorted(runs.items(), reverse=True):
        places: dict[Path, tuple[int, int, bool]] = {}
        for path in paths:
            try:
                saved = Checkpoint(path).metadata
            except InputError as error:
                warnings.warn(f"Skipping {path}: {error}", stacklevel=2)
                continue
            if "callbacks" in saved or not resumable:  # without, it is of the weights alone
                places[path] = _place_of(saved)
        if places:
            return max(places, key=places.__getitem__)
    return None


def _number_of(folder: Path) -> float:
    """The number that a logger has given to the run of a folder of checkpoints; infinite where none has."""
    found = re.fullmatch(r"version_(\d+)", folder.parent.name)
    return math.inf if found is None else int(found[1])


def _place_of(saved: dict[str, Any]) -> tuple[int, int, bool]:
    """How far the run of a checkpoint was: of two at the same step, one may be from before a validation."""
    place = saved.get(POSITION_KEY, {})
    return saved.get("global_step", -1), place.get("epoch", -1), place.get("is_validated", False)


def checkpoint_of(path: str | Path) -> str:
    """The newest checkpoint of a run, where the path is that of a run's folder; else the path as it is.

    Args:
        path: ``trainer.default_root_dir`` of a run, a checkpoint, or whatever else may be in place of one.
    """
    is_run = Path(path).is_dir() and not Checkpoint.is_at(path)
    found = newest(folders_of(path), resumable=False) if is_run else None
    if found is not None:
        rank_zero_info(f"The newest checkpoint of {path}: {found}")
    return str(found or path)


def folders_of(root: str | Path) -> list[Path]:
    """Where a run writes checkpoints: below ``checkpoints``, or where loggers of Lightning make it write them."""
    root = Path(root)
    return [root / "checkpoints", *sorted(root.glob("*/*/checkpoints"))]


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint of ours; ``None`` for a file with any other name.

    >>> step_of(Path("resume-epoch=1-step=250.ckpt")), step_of(Path("best.ckpt"))
    (250, None)
    """
    found = re.fullmatch(r"resume-(?:epoch=\d+-)?step=(\d+)\.ckpt", path.name)
    return None if found is None else int(found[1])


def sweep(folder: Path, pattern: str) -> None:
    """Remove what a process that was killed has left half written."""
    for path in folder.glob(f".{pattern}{PARTIAL}"):
        remove(path)


def bytes_of_checkpoint(module: torch.nn.Module) -> int:
    """At least how large a checkpoint is: what is trained, and two float32 values of the optimizer for each number."""
    return sum(p.numel() * (p.element_size() + 8) for p in module.parameters() if p.requires_grad)


def check_disk(folder: Path, size: int) -> None:
    """Refuse a disk on which a checkpoint has no room.

    Raises:
        InputError: When there is less room than ``size`` bytes.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(
            f"A checkpoint needs about {size / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB left. Make room, or "
            "set trainer.default_root_dir to a folder on a larger disk."
        )
