"""Checkpoints written by a thread while training continues, from a copy in host memory.

The copy is made by torch's ``DefaultStager`` and shards are written by ``torch.distributed.checkpoint.save``: the two
halves of its ``async_save``. What follows a write, its final name and the removal of old checkpoints, belongs into the
same thread. Lightning's ``AsyncCheckpointIO`` writes single files only, queues any number of copies in memory, and
reports an error only at a later save.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from typing import Any, cast

import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from lightning_sft.io.address import Place
from lightning_sft.types import InputError


class BackgroundWriter:
    """Writes one checkpoint at a time in a thread, from a copy in host memory.

    Args:
        strategy: Strategy of the trainer; every process must make its writer at the same time.

    Raises:
        InputError: When the strategy writes checkpoints itself.
    """

    def __init__(self, strategy: Strategy) -> None:
        refuse_own_writer(strategy, "SafeCheckpoint(in_background=True)")
        self.in_shards = isinstance(strategy, ModelParallelStrategy) and bool(strategy._save_distributed_checkpoint)
        # collectives of two threads must not mix in one group, and those of the thread need no device
        self.group = torch.distributed.new_group(backend="gloo") if self.in_shards else None
        on_gpu = strategy.root_device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu
            )
        )
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._write: Future[None] | None = None
        self._path: Place | None = None

    @property
    def path(self) -> Place | None:
        """The checkpoint being written, or already written and not yet waited for."""
        return self._path

    @property
    def has_ended(self) -> bool:
        """Whether there is a write that has ended, and was not yet waited for."""
        return self._write is not None and self._write.done()

    @property
    def has_failed(self) -> bool:
        """Whether there is a write that has failed, and was not yet waited for."""
        return self._write is not None and self._write.done() and self._write.exception() is not None

    def copy(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Copy a checkpoint to host memory, into the same buffers each time, page-locked ones for a GPU.

        The copy is complete on return, and valid until the next one, so no write may be under way.

        Args:
            checkpoint: Dictionary of tensors and plain values, nested.
        """
        assert self._write is None, "the write before reads the buffers"
        tensors = [leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, Tensor)]
        inner = {str(id(part)): part for tensor in tensors for part in _parts(tensor)}
        copies = cast("dict[str, Tensor]", self._stager.stage(inner))
        return deepcopy(checkpoint, {id(tensor): _rebuilt(tensor, copies) for tensor in tensors})

    def begin(self, path: Place, write: Callable[[], None]) -> None:
        """Write in the thread.

        Args:
            path: Final path of the checkpoint.
            write: Function that writes it.
        """
        assert self._write is None, "one write at a time"
        self._write, self._path = self._threads.submit(write), path

    def wait(self) -> InputError | None:
        """Wait for the write under way, if there is one, and return its error."""
        write, path, self._write, self._path = self._write, self._path, None, None
        error = None if write is None else write.exception()
        if error is None or isinstance(error, InputError):
            return error
        reason = InputError(f"The checkpoint {path} cannot be written: {error}. Those before it are intact.")
        reason.__cause__ = error
        return reason

    def close(self) -> None:
        """End the thread, after the write under way, and free the buffers."""
        self._threads.shutdown()
        self._stager.close()


def refuse_own_writer(strategy: Strategy, setting: str) -> None:
    """Refuse a strategy that writes checkpoints itself, as DeepSpeed.

    Args:
        strategy: Strategy of the trainer.
        setting: What it is refused for.

    Raises:
        InputError: For such a strategy.
    """
    own = type(strategy).save_checkpoint
    if not isinstance(strategy, ModelParallelStrategy) and own is not Strategy.save_checkpoint:
        raise InputError(
            f"{setting} needs a single device, ddp or fsdp2; {type(strategy).__name__} writes its checkpoints itself, "
            "to a local folder and while training waits. Use one of these strategies, or leave the setting out."
        )


def refuse_async_io(strategy: Strategy) -> None:
    """Refuse Lightning's plugin for asynchronous checkpoints, which returns before a file exists.

    Raises:
        InputError: When it is among the trainer's plugins.
    """
    if isinstance(strategy.checkpoint_io, AsyncCheckpointIO):
        raise InputError(
            "SafeCheckpoint cannot give a checkpoint its final name while the plugin AsyncCheckpointIO is still "
            "writing it. Remove the plugin from trainer.plugins, and set SafeCheckpoint(in_background=True)."
        )


def _parts(tensor: Tensor) -> list[Tensor]:
    """The tensors that a wrapper, such as a DTensor or a quantized optimizer state, consists of; else the tensor."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]


def _rebuilt(tensor: Tensor, copies: dict[str, Tensor]) -> Tensor:
    """A tensor of copies of its parts, by the ids of the parts."""
    if not is_traceable_wrapper_subclass(tensor):
        return copies[str(id(tensor))]
    names, context = tensor.__tensor_flatten__()
    parts = {name: _rebuilt(getattr(tensor, name), copies) for name in names}
    rebuilt: Tensor = type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())
    return rebuilt
