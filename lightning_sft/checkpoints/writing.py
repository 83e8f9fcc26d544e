"""Writing checkpoints atomically, and finding the newest valid one of a run."""

from __future__ import annotations

import math
import pickle
import re
import shutil
import warnings
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_sft.checkpoints.plain_states import why_not_resumable
from lightning_sft.checkpoints.reading import (
    DAMAGE,
    INDEX,
    META,
    Checkpoint,
    first_failure,
    know_optimizer_states,
    unreadable,
)
from lightning_sft.checkpoints.resume import POSITION_KEY, SHARDED_KEY
from lightning_sft.io.address import Address, Place, is_address, place
from lightning_sft.io.disk import PARTIAL, hidden, publish, remove, whole
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NAMED = 5  # maximum number of folders in a message


class AtomicIO(TorchCheckpointIO):
    """Writes checkpoints atomically, and reads quantized optimizer states.

    Lightning's own writer goes through the folder for temporary files, which is often on another disk; and makes a file
    in memory before it sends it to an address.
    """

    _has_warned = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the checkpoint under a hidden name, flush it to disk, and rename it; to an address, in a transaction.

        Raises:
            InputError: When it cannot be written.
        """
        if storage_options is not None:  # which Lightning refuses
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        to = place(path)
        if not self._has_warned and (reason := why_not_resumable(checkpoint)) is not None:
            self._has_warned = True
            rank_zero_warn(reason)
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(to, Address):
                with to.transaction(), to.open("wb") as file:
                    torch.save(checkpoint, file)
            else:
                with whole(to) as [partial], partial.open("wb") as file:
                    torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            raise unwritten(path, error) from error
        except (pickle.PicklingError, AttributeError, TypeError) as error:  # what pickle raises for objects it refuses
            raise unwritten(path, why_not_resumable(checkpoint) or error) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint on the CPU, since torch refuses a callable location for tensor subclasses.

        Of a sharded checkpoint, only weights and facts are loaded.

        Raises:
            InputError: When it is not a checkpoint of Lightning, or not even a path.
        """
        is_path = isinstance(path, (str, PathLike, Address))
        if not is_path:
            raise InputError(f"ckpt_path is {path!r}; expected the path of a checkpoint, last or best.")
        if place(path).is_dir():
            return Checkpoint(path).whole() | {SHARDED_KEY: True}
        Checkpoint(path).check_is_whole()
        know_optimizer_states(path)
        try:
            found: Any = super().load_checkpoint(path, map_location, weights_only)
        except DAMAGE as error:
            raise unreadable(place(path), error) from error
        if not isinstance(found, dict) or "pytorch-lightning_version" not in found:
            what = (
                f"a dictionary of {', '.join(map(str, list(found)[:5]))}"
                if isinstance(found, dict)
                else "not a dictionary"
            )
            raise InputError(f"{path} is not a checkpoint of Lightning, but {what}. Expected a file saved by fit.")
        if not isinstance(found.get("state_dict"), dict):
            raise InputError(f"{path} is not a checkpoint of a module: it has no 'state_dict'.")
        return found


def write_whole(trainer: Trainer) -> None:
    """Make a trainer use :class:`AtomicIO` for all checkpoint files, including those of Lightning's ModelCheckpoint."""
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicIO()


def newest(folders: Iterable[str | Place], *, resumable: bool = True) -> Path | str | None:
    """The checkpoint of the latest step, or ``None``; unreadable ones are skipped with a warning.

    Steps are read from the checkpoints, not inferred from file times. Folders numbered by a logger (``version_3``)
    belong to separate runs: they are searched after all others, highest number first.

    Args:
        folders: Folders to search, which need not exist, or addresses.
        resumable: Whether to ignore weights-only checkpoints, from which no run can resume.
    """
    runs: dict[float, list[Place]] = {}
    for folder in dict.fromkeys(map(place, folders)):
        runs.setdefault(_number_of(folder), []).extend(sorted(folder.glob("*.ckpt")))
    for _, paths in sorted(runs.items(), reverse=True):
        places: dict[Place, tuple[int, int, bool, bool]] = {}
        for path in paths:
            try:
                saved = Checkpoint(path).metadata
            except InputError as error:
                warnings.warn(f"Skipping {path}: {error}", stacklevel=2)
                continue
            is_whole = "callbacks" in saved  # otherwise weights only
            if is_whole or not resumable:
                places[path] = (*_place_of(saved), is_whole)
        if places:
            found = max(places, key=places.__getitem__)
            return str(found) if isinstance(found, Address) else found
    return None


def why_unreadable(paths: Iterable[Place]) -> str | None:
    """Why the last of these checkpoints cannot be read, or ``None`` if one of them can."""
    reason = None
    for path in sorted(paths, key=lambda path: (step_of(path) or 0, str(path))):
        try:
            _ = Checkpoint(path).metadata
        except InputError as error:
            reason = str(error)
        else:
            return None
    return reason


def _number_of(folder: Place) -> float:
    """The logger's version number of a checkpoint folder's run; infinite without one."""
    found = re.fullmatch(r"version_(\d+)", folder.parent.name)
    return math.inf if found is None else int(found[1])


def _place_of(saved: dict[str, Any]) -> tuple[int, int, bool]:
    """Progress of a checkpoint's run; of two at the same step, one may precede a validation."""
    place = saved.get(POSITION_KEY, {})
    return saved.get("global_step", -1), place.get("epoch", -1), place.get("is_validated", False)


def checkpoint_of(path: str | Path) -> str:
    """The newest checkpoint if the path is the folder of a run or of checkpoints, otherwise the path unchanged.

    Args:
        path: ``trainer.default_root_dir`` of a run, a folder that holds checkpoints at any depth, a checkpoint, or any
            other model path; an address is left as it is.

    Raises:
        InputError: When the folder is none of a run, and several folders in it hold checkpoints.
    """
    if is_address(path):
        return str(path)
    is_folder = Path(path).is_dir() and not Checkpoint.is_at(path)
    found = newest(folders_of(path), resumable=False) if is_folder else None
    if is_folder and found is None:
        found = newest(_below(Path(path)), resumable=False)
    if found is not None:
        rank_zero_info(f"The newest checkpoint of {path}: {found}")
    return str(found or path)


def _below(root: Path) -> list[Path]:
    """The folder that holds checkpoints at any depth, or several that a logger has numbered."""
    found = sorted({checkpoint.parent for checkpoint in root.rglob("*.ckpt")})
    if len(found) > 1 and any(math.isinf(_number_of(folder)) for folder in found):
        names = ", ".join(map(str, found[:_NAMED])) + (", …" if len(found) > _NAMED else "")
        raise InputError(f"{root} holds the checkpoints of several runs. Give the folder of one: {names}.")
    return found


def folders_of(root: str | Path) -> list[Path]:
    """Folders in which a run may have checkpoints: ``checkpoints``, and those below its loggers' folders.

    Runs that have a folder of their own below ``root``, as their config says, are other runs.
    """
    root = Path(root)
    below = sorted(root.glob("*/*/checkpoints"))
    return [root / "checkpoints", *(folder for folder in below if not _is_root(folder.parent))]


def _is_root(folder: Path) -> bool:
    """Whether a folder is the ``default_root_dir`` of the config that is saved in it, which may have been relative."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        parts = Path(config["trainer"]["default_root_dir"]).parts
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        return False
    return bool(parts) and folder.resolve().parts[-len(parts) :] == parts


def step_of(path: Place) -> int | None:
    """The step in the name of a SafeCheckpoint file; ``None`` for any other name.

    >>> step_of(Path("resume-epoch=1-step=250.ckpt")), step_of(Path("best.ckpt"))
    (250, None)
    """
    found = re.fullmatch(r"resume-(?:epoch=\d+-)?step=(\d+)\.ckpt", path.name)
    return None if found is None else int(found[1])


def sweep(folder: Place, pattern: str) -> None:
    """Remove partial checkpoints left by killed processes."""
    if isinstance(folder, Address):
        for address in folder.glob(pattern):
            if address.is_dir() and not (address / INDEX).exists():
                address.remove()
        return
    for path in folder.glob(f".{pattern}{PARTIAL}"):
        remove(path)


def partial_of(path: Place) -> Place:
    """Where a checkpoint is written, before :func:`finish` gives it its final name.

    At an address nothing can be renamed at once: a file appears there when it is complete, and a folder counts from the
    moment on when it has an index, which is written last.
    """
    return path if isinstance(path, Address) else hidden(path)


def finish(path: Place) -> None:
    """Make a checkpoint that all processes have written to :func:`partial_of` the one at ``path``.

    Raises:
        InputError: When it cannot be renamed.
    """
    try:
        if not isinstance(path, Address):
            publish(path)
    except OSError as error:
        raise unwritten(path, error) from error


def unwritten(path: str | Place, reason: object) -> InputError:
    """The error for a checkpoint that cannot be written."""
    return InputError(f"The checkpoint {path} cannot be written: {reason}. Those before it are intact.")


def remove_checkpoint(path: Place) -> None:
    """Remove a checkpoint; one that is removed only half does not count."""
    if isinstance(path, Address):
        (path / INDEX).remove()
        path.remove()
    else:
        remove(path)


def write_shards(checkpoint: dict[str, Any], folder: Place, group: ProcessGroup | None = None) -> None:
    """Write this process's shard of a checkpoint, its tensors into torch's format; every process must call this.

    Args:
        checkpoint: The checkpoint, as each process has it.
        folder: Folder that is written, which is no complete checkpoint until all have written to it.
        group: The processes; by default all.

    Raises:
        InputError: On every process, when one of them cannot write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.checkpoint.utils import _DistWrapper

    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    states = {f"optimizer_{n}": state for n, state in enumerate(checkpoint.get("optimizer_states", []))}

    def begin() -> None:
        remove_checkpoint(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / META).open("wb") as file:
            torch.save(rest, file)

    to = str(folder) if isinstance(folder, Address) else folder
    try:
        _DistWrapper(group, True, 0).broadcast("begin", begin)  # in the first process, whose error reaches all
        save({"state_dict": checkpoint["state_dict"], **states}, checkpoint_id=to, process_group=group)
    except CheckpointException as error:
        raise unwritten(folder, first_failure(error)) from error


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
