"""Checkpoints written by a thread while training continues, from a copy in host memory.

Between two optimizer steps nothing changes the trained weights and the states of optimizers. So the thread makes their
copy as well, while the next forward and backward pass run, and the next optimizer step waits for it
(:meth:`BackgroundWriter.wait_for_copy`). Plain values, and tensors that a forward pass may change, such as buffers, are
copied at once.

Shards are written by ``torch.distributed.checkpoint.save``. What follows a write, its final name and the removal of old
checkpoints, belongs into the same thread. Lightning's ``AsyncCheckpointIO`` writes single files only, queues any number
of copies in memory, and reports an error only at a later save.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from threading import Event
from typing import Any

import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from lightning_sft.checkpoints.writing import unwritten
from lightning_sft.io.address import Place
from lightning_sft.types import InputError


class HostBuffers:
    """Copies of tensors in host memory, page-locked for a GPU, in buffers that are used again for the next copy.

    Args:
        device: Device of the tensors; those in host memory may be among them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[int, Tensor] = {}  # bytes, by the address of the storage that they are a copy of
        self._later: dict[int, UntypedStorage] = {}  # storages to copy in `finish`, by address
        self._versions: list[tuple[Tensor, int]] = []
        self._ready: torch.cuda.Event | None = None

    def begin(self, tensors: Sequence[Tensor], settled: Sequence[Tensor]) -> list[Tensor]:
        """Copy tensors, except those that :meth:`finish` can copy.

        Args:
            tensors: Tensors to copy; wrappers around others, such as DTensors, may be among them.
            settled: Tensors that keep their values until :meth:`finish` returns.

        Returns:
            Tensors in host memory that have the values of ``tensors`` then, and share what these share.

        Raises:
            InputError: When there is no room for them.
        """
        sources = {storage.data_ptr(): storage for tensor in tensors for storage in _storages(tensor)}
        kept = {storage.data_ptr() for tensor in settled for storage in _storages(tensor)}
        self._buffers = {address: buffer for address, buffer in self._buffers.items() if address in sources}
        self._buffers = {address: self._buffer(address, source) for address, source in sources.items()}
        self._later = {address: source for address, source in sources.items() if address in kept}
        own = [tensor for tensor in tensors if any(part.data_ptr() in self._later for part in _storages(tensor))]
        self._versions = [(tensor, tensor._version) for tensor in own]
        self._copy({address: source for address, source in sources.items() if address not in kept})
        if self._stream is not None:  # what is queued from here on may change the tensors
            self._ready = torch.cuda.current_stream(self._device).record_event()
        return [self._of(tensor) for tensor in tensors]

    def finish(self) -> bool:
        """Copy the others, in any thread, and wait until all copies are complete.

        Returns:
            Whether no settled tensor was changed in place meanwhile, as far as torch counts changes.
        """
        if self._stream is None or self._ready is None:
            self._copy(self._later)
        else:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(self._ready)
                self._copy(self._later)
            self._stream.synchronize()
        versions, self._versions, self._later = self._versions, [], {}
        return all(tensor._version == version for tensor, version in versions)

    def _buffer(self, address: int, source: UntypedStorage) -> Tensor:
        buffer = self._buffers.get(address)
        if buffer is None or len(buffer) != source.nbytes():
            try:
                buffer = torch.empty(source.nbytes(), dtype=torch.uint8, pin_memory=self._stream is not None)
            except RuntimeError as error:
                raise InputError(
                    f"There is no room in host memory for a copy of the checkpoint: {error}. Set "
                    "SafeCheckpoint(in_background=False)."
                ) from error
        return buffer

    def _copy(self, sources: dict[int, UntypedStorage]) -> None:
        for address, source in sources.items():
            data = torch.empty(0, dtype=torch.uint8, device=source.device).set_(source)
            self._buffers[address].copy_(data, non_blocking=self._stream is not None)

    def _of(self, tensor: Tensor) -> Tensor:
        """The copy of a tensor, or of a wrapper around others."""
        if not is_traceable_wrapper_subclass(tensor):
            buffer = self._buffers[tensor.untyped_storage().data_ptr()].untyped_storage()
            place = tensor.storage_offset(), tensor.size(), tensor.stride()
            return torch.empty(0, dtype=tensor.dtype).set_(buffer, *place)
        names, context = tensor.__tensor_flatten__()
        values = {name: getattr(tensor, name) for name in names}  # also a DTensor's mesh, since torch 2.13
        parts = {name: self._of(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        copy: Tensor = type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())
        return copy


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
        device = strategy.root_device  # a thread begins on the first GPU, where torch's writer would use memory
        begin = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._threads = ThreadPoolExecutor(1, "checkpoint", begin)
        self._buffers = HostBuffers(device)
        self._is_copied = Event()
        self._is_copied.set()
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

    def begin(
        self,
        path: Place,
        checkpoint: dict[str, Any],
        write: Callable[[dict[str, Any]], None],
        settled: Sequence[Tensor] = (),
    ) -> None:
        """Copy a checkpoint to host memory, and write the copy in the thread.

        Args:
            path: Final path of the checkpoint.
            checkpoint: Dictionary of tensors and plain values, nested.
            write: Function that writes the copy.
            settled: Tensors that keep their values until :meth:`wait_for_copy` returns, so that the thread can copy
                them; everything else is copied at once.
        """
        assert self._write is None, "the write before reads the buffers"
        tensors = [leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, Tensor)]
        on_host = zip(tensors, self._buffers.begin(tensors, settled), strict=True)
        copy = deepcopy(checkpoint, {id(tensor): own for tensor, own in on_host})
        self._is_copied.clear()

        def work() -> None:
            try:
                is_whole = self._buffers.finish()
            finally:
                self._is_copied.set()
            if not is_whole:
                raise InputError(
                    f"The checkpoint {path} was not written: weights or states of an optimizer were changed outside "
                    "of an optimizer step while they were copied. Change them in a callback's on_train_batch_end, or "
                    "set SafeCheckpoint(in_background=False)."
                )
            write(copy)

        self._write, self._path = self._threads.submit(work), path

    def wait_for_copy(self) -> None:
        """Wait until nothing that the checkpoint was begun with is read any more."""
        self._is_copied.wait()

    def wait(self) -> InputError | None:
        """Wait for the write under way, if there is one, and return its error."""
        write, path, self._write, self._path = self._write, self._path, None, None
        error = None if write is None else write.exception()
        if error is None or isinstance(error, InputError):
            return error
        reason = unwritten(str(path), error)
        reason.__cause__ = error
        return reason

    def close(self) -> None:
        """End the thread, after the write under way, and free the buffers."""
        self._threads.shutdown()
        self._buffers = HostBuffers(torch.device("cpu"))


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


def _storages(tensor: Tensor) -> list[UntypedStorage]:
    """The storages of a tensor, or of those that a wrapper, such as a DTensor or a quantized state, consists of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.untyped_storage()]
    parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [storage for part in parts if isinstance(part, Tensor) for storage in _storages(part)]
