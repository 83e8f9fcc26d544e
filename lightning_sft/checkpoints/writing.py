"""Writing checkpoints atomically, and finding the newest valid one of a run."""

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
from lightning_sft.io.disk import PARTIAL, remove, whole
from lightning_sft.types import InputError


class AtomicIO(TorchCheckpointIO):
    """Writes checkpoints atomically, and reads quantized optimizer states.

    Lightning's own writer goes through the folder for temporary files, which is often on another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the checkpoint under a hidden name, flush it to disk, and rename it.

        Raises:
            InputError: When it cannot be written.
        """
        if "://" in str(path) or storage_options is not None:  # not on a local disk: left to Lightning
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with whole(path) as [partial], partial.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            raise InputError(
                f"The checkpoint {path} cannot be written: {error}. Those before it are intact."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint on the CPU, since torch refuses a callable location for tensor subclasses.

        Of a sharded checkpoint, only weights and facts are loaded.

        Raises:
            InputError: When it is not a checkpoint of Lightning.
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
                else "not a dictionary"
            )
            raise InputError(f"{path} is not a checkpoint of Lightning, but {what}. Expected a file saved by fit.")
        return found


def write_whole(trainer: Trainer) -> None:
    """Make a trainer use :class:`AtomicIO` for all checkpoint files, including those of Lightning's ModelCheckpoint."""
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicIO()


def newest(folders: Iterable[str | Path], *, resumable: bool = True) -> Path | None:
    """The checkpoint of the latest step, or ``None``; unreadable ones are skipped with a warning.

    Steps are read from the checkpoints, not inferred from file times. Folders numbered by a logger (``version_3``)
    belong to separate runs: they are searched after all others, highest number first.

    Args:
        folders: Folders to search, which need not exist.
        resumable: Whether to ignore weights-only checkpoints, from which no run can resume.
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
            if "callbacks" in saved or not resumable:  # otherwise weights only
                places[path] = _place_of(saved)
        if places:
            return max(places, key=places.__getitem__)
    return None


def _number_of(folder: Path) -> float:
    """The logger's version number of a checkpoint folder's run; infinite without one."""
    found = re.fullmatch(r"version_(\d+)", folder.parent.name)
    return math.inf if found is None else int(found[1])


def _place_of(saved: dict[str, Any]) -> tuple[int, int, bool]:
    """Progress of a checkpoint's run; of two at the same step, one may precede a validation."""
    place = saved.get(POSITION_KEY, {})
    return saved.get("global_step", -1), place.get("epoch", -1), place.get("is_validated", False)


def checkpoint_of(path: str | Path) -> str:
    """The newest checkpoint if the path is the folder of a run, otherwise the path unchanged.

    Args:
        path: ``trainer.default_root_dir`` of a run, a checkpoint, or any other model path.
    """
    is_run = Path(path).is_dir() and not Checkpoint.is_at(path)
    found = newest(folders_of(path), resumable=False) if is_run else None
    if found is not None:
        rank_zero_info(f"The newest checkpoint of {path}: {found}")
    return str(found or path)


def folders_of(root: str | Path) -> list[Path]:
    """Folders in which a run may have checkpoints: ``checkpoints``, and those below its loggers' folders."""
    root = Path(root)
    return [root / "checkpoints", *sorted(root.glob("*/*/checkpoints"))]


def step_of(path: Path) -> int | None:
    """The step in the name of a SafeCheckpoint file; ``None`` for any other name.

    >>> step_of(Path("resume-epoch=1-step=250.ckpt")), step_of(Path("best.ckpt"))
    (250, None)
    """
    found = re.fullmatch(r"resume-(?:epoch=\d+-)?step=(\d+)\.ckpt", path.name)
    return None if found is None else int(found[1])


def sweep(folder: Path, pattern: str) -> None:
    """Remove partial files left by killed processes."""
    for path in folder.glob(f".{pattern}{PARTIAL}"):
        remove(path)


def bytes_of_checkpoint(module: torch.nn.Module) -> int:
    """Estimated checkpoint size in bytes: trained parameters, and two float32 optimizer states per element."""
    return sum(p.numel() * (p.element_size() + 8) for p in module.parameters() if p.requires_grad)


def check_disk(folder: Path, size: int) -> None:
    """Refuse a disk without room for a checkpoint.

    Raises:
        InputError: When there is less room than ``size`` bytes.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(
            f"A checkpoint needs about {size / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB left. Make room, or "
            "set trainer.default_root_dir to a folder on a larger disk."
        )
