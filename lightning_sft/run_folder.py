"""The checkpoints of a run on disk: written whole or not at all, and the newest good one found."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.checkpoints import facts, is_checkpoint, know_optimizer_states, weights
from lightning_sft.disk import sync
from lightning_sft.types import InputError

_PARTIAL = ".partial"


def hidden(path: str | Path) -> Path:
    """The name beside ``path`` under which it is written, before :func:`publish`."""
    return Path(path).with_name(f".{Path(path).name}{_PARTIAL}")


def publish(path: str | Path) -> None:
    """Move what was written to :func:`hidden` to its own name in one go, when all of it is on the disk.

    A process that is killed, or a disk that is full, leaves nothing under ``path``, or what was there before.

    Args:
        path: A file or a folder.
    """
    path, partial = Path(path), hidden(path)
    sync([*(partial.rglob("*") if partial.is_dir() else ()), partial])
    if path.is_dir():  # a folder cannot take the place of another
        remove(path)
    partial.replace(path)
    sync([path.parent])


SHARDED = "lightning_sft_sharded"
"""Which key a loaded checkpoint has where only the weights of a sharded one were read."""


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
                return facts(path) | {"state_dict": weights(path), SHARDED: True}
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


def write_whole(trainer: Any) -> None:
    """Have all checkpoint files of a trainer written and read our way, also those of Lightning's ModelCheckpoint."""
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicIO()


def newest(folders: Iterable[str | Path]) -> Path | None:
    """The newest checkpoint from which a run can go on; those that were cut short are passed over with a warning.

    Args:
        folders: Where to look; they need not exist.
    """
    found = [path for folder in folders for path in Path(folder).glob("*.ckpt")]
    for path in sorted(found, key=lambda path: path.lstat().st_mtime_ns, reverse=True):
        try:
            saved = facts(path)
        except InputError as error:
            warnings.warn(f"{path} is passed over: {error}", stacklevel=2)
            continue
        if "callbacks" in saved:  # else it is of the weights alone
            return path
    return None


def checkpoint_of(path: str | Path) -> str:
    """The newest checkpoint of a run, where the path is that of a run's folder; else the path as it is.

    Args:
        path: ``trainer.default_root_dir`` of a run, a checkpoint, or whatever else may be in place of one.
    """
    found = newest(folders_of(path)) if Path(path).is_dir() and not is_checkpoint(path) else None
    if found is not None:
        rank_zero_info(f"The newest checkpoint of {path}: {found}")
    return str(found or path)


def folders_of(root: str | Path) -> list[Path]:
    """Where a run writes checkpoints: below ``checkpoints``, or where loggers of Lightning make it write them."""
    root = Path(root)
    return [root / "checkpoints", *sorted(root.glob("*/*/checkpoints"))]


def remove(path: Path) -> None:
    """Remove a file or a folder; a folder that is removed only half is under a hidden name by then."""
    if path.is_dir() and not path.is_symlink():
        gone = path if path.name.endswith(_PARTIAL) else path.rename(path.with_name(f".{path.name}.removed{_PARTIAL}"))
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path, pattern: str) -> None:
    """Remove what a process that was killed has left half written."""
    for path in folder.glob(f".{pattern}{_PARTIAL}"):
        remove(path)


def bytes_of_checkpoint(module: torch.nn.Module) -> int:
    """At least how large a checkpoint is: what is trained, and two float32 values of the optimiser for each number."""
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
