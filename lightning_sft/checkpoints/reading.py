"""Reading checkpoints of any strategy, without the strategy and without running code stored in them.

Supported are files; folders of torch's distributed checkpoints with ``meta.pt``, as written under FSDP2 and tensor
parallelism; and folders of DeepSpeed. All are read like the file of a single process: unsharded tensors on the CPU.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import is_dataclass
from enum import Enum
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_sft.io.address import Address, Place, place
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException

Kind = Literal["file", "distributed", "deepspeed"]

META = "meta.pt"  # Lightning's file for everything but tensors in a distributed checkpoint
INDEX = ".metadata"  # torch's file of what is where in it, written last
WEIGHTS = "scorer.model."  # with which the names of the weights of an SFTModule's model begin
RUN_INFO_KEY = "lightning_sft"
"""Checkpoint key of the facts of the run."""
_PREFIX = "state_dict."
_OPTIMIZERS = "torchao.optim"


class Checkpoint:
    """A checkpoint on disk, whatever strategy wrote it; read when asked for, and nothing in it is run.

    Args:
        path: The file or folder, also by an address that fsspec knows.
    """

    def __init__(self, path: str | Place) -> None:
        self.path = place(path)

    @staticmethod
    def is_at(path: str | Place) -> bool:
        """Whether a path is that of a checkpoint, complete or not, rather than of a model or a run."""
        path = place(path)
        return path.suffix == ".ckpt" or any((path / name).exists() for name in (INDEX, META, "latest"))

    @cached_property
    def kind(self) -> Kind:
        """Which strategies wrote it.

        Raises:
            InputError: When it does not exist, or is incomplete.
        """
        path = self.path
        if path.is_file():
            return "file"
        if (path / "latest").is_file():
            return "deepspeed"
        if not path.is_dir():
            raise InputError(f"There is no checkpoint {str(path)!r}.")
        missing = [name for name in (META, INDEX) if not (path / name).is_file()]
        if missing:
            raise InputError(
                f"{path} is not a complete checkpoint: it has no {' and no '.join(missing)}. Expected a .ckpt file, a "
                "folder written with trainer.strategy=fsdp2 or deepspeed, or the folder of a run with checkpoints. If "
                "the run was killed while writing it, use an earlier one."
            )
        return "distributed"

    def check_is_whole(self) -> None:
        """Refuse a checkpoint that is not there, or a file that is empty, cut short or none of torch; none are loaded.

        Raises:
            InputError: When it is one of them.
        """
        if self.kind == "file":
            with self.path.open("rb") as file:
                if not zipfile.is_zipfile(file):
                    raise unreadable(self.path, None)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Everything but its tensors, so hyperparameters, counters, and states of callbacks and data module.

        Raises:
            InputError: When there is no checkpoint, or it cannot be read without running code.
        """
        file = {"file": self.path, "distributed": self.path / META}.get(self.kind) or _of_deepspeed(self.path)[0]
        left_out = ("state_dict", "module", "optimizer", "optimizer_states")
        return _found({key: value for key, value in _load(file, "meta").items() if key not in left_out})

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """The hyperparameters of the module.

        Raises:
            InputError: When it is no checkpoint of Lightning, or cannot be read without running code.
        """
        found = self.metadata.get("hyper_parameters", {})
        if not isinstance(found, dict):
            raise InputError(
                f"{self.path} is not a checkpoint of Lightning: its 'hyper_parameters' are not a dictionary."
            )
        return found

    @property
    def step(self) -> int:
        """Number of optimizer steps of its run."""
        return int(self.metadata.get("global_step", 0))

    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes of the weights of a distributed checkpoint, by their names in the module; none are read.

        Raises:
            InputError: When its index could run code, or cannot be read.
        """
        return {name: entry.properties.dtype for name, entry in _entries(self.path).items()}

    def weights(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The weights on the CPU, by their names in the module.

        For DeepSpeed these are the float32 master weights of its optimizer, if there are any.

        Args:
            names: Weights to read of a distributed checkpoint; by default all.

        Raises:
            InputError: When there is no checkpoint, or it cannot be read without running code.
        """
        if self.kind == "distributed":
            return _distributed_weights(self.path, names)
        if self.kind == "deepspeed":
            return _deepspeed_weights(self.path)
        found = _load(self.path, "cpu").get("state_dict")
        if not isinstance(found, dict):
            raise InputError(f"{self.path} is not a checkpoint of a module: it has no 'state_dict'.")
        return found

    def whole(self) -> dict[str, Any]:
        """Metadata and weights, as the checkpoint file of a single process has them."""
        return self.metadata | {"state_dict": self.weights()}


def found_from(folder: str | None, name: str) -> str:
    """A name as it is, or as a path in another folder where it exists only there.

    >>> found_from("/usr", "lib"), found_from("/usr", "owner/model"), found_from(None, "lib")
    ('/usr/lib', 'owner/model', 'lib')
    """
    there = Path(folder or ".", name)
    return str(there) if folder and not Path(name).exists() and there.exists() else name


def _found(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata whose model and tokenizer, given relative to the folder in which the run began, are found from here."""
    run = metadata.get(RUN_INFO_KEY)
    folder = run.get("folder") if isinstance(run, dict) else None
    for part in metadata.values():
        for name in ("pretrained", "tokenizer") if isinstance(part, dict) and isinstance(folder, str) else ():
            if isinstance(part.get(name), str):
                part[name] = found_from(folder, part[name])
    return metadata


def _reader(path: Place) -> Any:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    check_index(path)
    return FsspecReader(str(path)) if isinstance(path, Address) else FileSystemReader(path)


def _entries(path: Place) -> dict[str, Any]:
    """What the index of a distributed checkpoint says of its weights, by name."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = _reader(path).read_metadata().state_dict_metadata
    return {
        name.removeprefix(_PREFIX): entry
        for name, entry in entries.items()
        if name.startswith(_PREFIX) and isinstance(entry, TensorStorageMetadata)
    }


def _distributed_weights(path: Place, names: Collection[str] | None) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    entries = _entries(path)
    tensors = {
        f"{_PREFIX}{name}": torch.empty(entries[name].size, dtype=entries[name].properties.dtype)
        for name in (entries if names is None else names)
    }
    try:
        with warnings.catch_warnings():  # about loading in a single process, which is intended
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(tensors, storage_reader=_reader(path), no_dist=True)  # reads only these
    except CheckpointException as error:
        raise InputError(f"{path} cannot be read, it may have been cut short: {first_failure(error)}") from error
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def _deepspeed_weights(path: Place) -> dict[str, Tensor]:
    model_states = _of_deepspeed(path)
    if not list(model_states[0].parent.glob("*_optim_states.pt")):  # stage 0 is not partitioned
        found: dict[str, Tensor] = _load(model_states[0], "cpu")["module"]
        return found
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise InputError(
            f"{path} is a checkpoint of DeepSpeed, which is needed to read it. Run: pip install deepspeed."
        ) from error
    harmless = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    # its files are named by rank; it prints its progress
    with torch.serialization.safe_globals(harmless), tensors_alone(), redirect_stdout(io.StringIO()):
        try:
            merged: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(path))
        except (RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"{path} cannot be read: {_reason(error)}") from error
    return merged


def _of_deepspeed(path: Place) -> list[Path]:
    """The model-state files of a DeepSpeed checkpoint, rank 0 first."""
    if isinstance(path, Address):
        raise InputError(
            f"{path} is a checkpoint of DeepSpeed, which reads and writes local folders only. Copy it to one."
        )
    folder = path / (path / "latest").read_text(encoding="utf-8").strip()
    found = sorted(folder.glob("*_model_states.pt"))
    if not found:
        raise InputError(f"{folder} has no *_model_states.pt, so it is not a complete checkpoint of DeepSpeed.")
    return found


def _load(path: Place, device: str) -> dict[str, Any]:
    know_optimizer_states(path)
    try:
        if isinstance(path, Address):
            with path.open() as file:  # to "meta", torch reads no tensors
                found: Any = torch.load(file, map_location=device, weights_only=True)
        else:
            found = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except DAMAGE as error:
        raise unreadable(path, error) from error
    if not isinstance(found, dict):
        raise InputError(
            f"{path} is not a checkpoint of Lightning: it holds a {type(found).__name__}, not a dictionary."
        )
    whole: dict[str, Any] = found
    return whole


DAMAGE = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, ValueError, AttributeError, TypeError)
"""What torch raises for files that are damaged, or none of its own."""


def unreadable(path: Place, error: BaseException | None) -> InputError:
    """The refusal of a checkpoint file that torch does not load, for what can be seen of the file.

    Args:
        path: The file.
        error: What torch has raised, if it has tried.
    """
    with path.open("rb") as file:
        first, is_whole = file.read(4), zipfile.is_zipfile(file)
    earlier = "Give the path of another one; ckpt_path=last skips damaged ones."
    if not first:
        return InputError(f"{path} is not a checkpoint: the file is empty. {earlier}")
    if first[:2] != b"PK":
        return InputError(f"{path} is not a checkpoint: the file is none that torch has saved. {earlier}")
    if not is_whole:
        return InputError(f"{path} cannot be read, it was cut short. {earlier}")
    said = str(error)
    if isinstance(error, pickle.UnpicklingError) and any(word in said for word in _CODE):
        return InputError(
            f"{path} holds more than tensors and plain values, so loading it could run code; it was not loaded. "
            f"A callback or module keeps an object in its state: {_reason(error)} If you have written it yourself, "
            "torch.serialization.add_safe_globals([...]) with its classes allows them."
        )
    return InputError(f"{path} cannot be read, it is damaged ({_reason(error).partition('. ')[0]}). {earlier}")


_CODE = ("Unsupported global", "Unsupported class", "GLOBAL", "allowed")  # words of torch for what could run code


def know_optimizer_states(path: str | Place) -> None:
    """Allow torch to load quantized states of torchao's optimizers if a file has any, without running code.

    On import, torchao registers its tensor classes with torch as safe; nothing else is allowed.

    Args:
        path: A file written by torch.save, or any other file.

    Raises:
        InputError: When the file has such states, and torchao is not installed.
    """
    names: list[str] = []
    causes = (ValueError, RuntimeError, OSError, EOFError, pickle.UnpicklingError)
    with suppress(*causes), place(path).open("rb") as file:  # loading reports what is wrong
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if any(name.startswith(f"{_OPTIMIZERS}.") for name in names):
        if find_spec("torchao") is None:
            raise InputError(f"{path} has states of a torchao optimizer, which need torchao: pip install torchao.")
        import_module(_OPTIMIZERS)


@contextmanager
def tensors_alone() -> Iterator[None]:
    """Context in which torch.load always uses ``weights_only=True``, even if a library passes ``False``."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


class _Index(pickle.Unpickler):
    """Unpickler for the index of a distributed checkpoint, which torch would unpickle without restriction."""

    def find_class(self, module: str, name: str) -> Any:
        """Allow only what an index consists of: torch's records, dtypes, sizes and paths."""
        known = ("pathlib", "pathlib._local", "torch", "torch.serialization")
        if module in known or module.startswith("torch.distributed.checkpoint."):
            found: Any = super().find_class(module, name)
            if isinstance(found, torch.dtype) or found in (torch.Size, torch.serialization._get_layout):
                return found
            if isinstance(found, type) and (is_dataclass(found) or issubclass(found, (Enum, PurePath))):
                return found
        raise InputError(f"It refers to {module}.{name}, which no index of torch needs and which could run code.")


def check_index(path: Place) -> None:
    """Refuse a distributed checkpoint whose index could run code when torch reads it.

    Args:
        path: Folder of the checkpoint.

    Raises:
        InputError: When the index holds anything but an index, or cannot be read.
    """
    path = path / INDEX
    try:
        with path.open("rb") as file:
            _Index(file).load()
    except InputError as error:
        raise InputError(f"{path} was not loaded. {error}") from error
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise InputError(f"{path} cannot be read, it may have been cut short: {_reason(error)}") from error


def _reason(error: BaseException | None) -> str:
    text = str(error).strip()
    said = text.partition("WeightsUnpickler error:")[2].strip() or text  # before it, torch advises to run what is there
    return next(iter(said.splitlines()), type(error).__name__)


def first_failure(error: CheckpointException) -> str:
    """What was wrong on the first of the processes that an error of torch's distributed checkpoints is of."""
    cause, _ = next(iter(error.failures.values()))
    return _reason(cause)
