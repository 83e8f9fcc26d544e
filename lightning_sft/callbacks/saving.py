"""A checkpoint of a trainer, written whole while training waits, or by a thread while it continues."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_sft.callbacks.optimizer_in_backward import OptimizerInBackward
from lightning_sft.checkpoints.background import BackgroundWriter
from lightning_sft.checkpoints.plain_states import refuse_objects
from lightning_sft.checkpoints.writing import finish, partial_of, write_shards
from lightning_sft.io.address import place
from lightning_sft.training.optimizers import parts_of
from lightning_sft.training.trainer import callbacks_of, datamodule_of, first_rank_does
from lightning_sft.types import InputError

_BETWEEN_STEPS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
_KNOWN = ("lightning", "lightning_sft")  # packages whose hooks between two steps change no weights


def save_whole(trainer: Trainer, path: str | Path, weights_only: bool = False) -> None:
    """Save a checkpoint under a hidden name, and rename it after all processes have written their part.

    Args:
        trainer: Trainer to save; every process must call this.
        path: Final path of the checkpoint, a file or a folder depending on the strategy, or an address.
        weights_only: Whether to leave out what a run needs to resume.

    Raises:
        InputError: On every process, when it cannot be written, or has objects that no run could resume from.
    """
    to, error = place(trainer.strategy.broadcast(str(path))), None
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only)
    first_rank_does(trainer, lambda: refuse_objects(checkpoint))
    try:
        trainer.strategy.save_checkpoint(checkpoint, str(partial_of(to)))
    except InputError as found:
        error = found

    def end() -> None:
        if error is not None:
            raise error
        finish(to)

    first_rank_does(trainer, end)


def check_states(trainer: Trainer) -> None:
    """Refuse states that no run could resume from, as far as they are known before the first step.

    Args:
        trainer: Trainer whose callbacks and data module have states; every process must call this.

    Raises:
        InputError: On every process, with the state and the object in it.
    """
    states: dict[str, Any] = {}
    for callback in callbacks_of(trainer):
        with suppress(AttributeError, LookupError, TypeError):  # of a state that begins with the first step
            states[callback.state_key] = callback.state_dict()
    data = datamodule_of(trainer)
    known = {
        "callbacks": states,
        "hyper_parameters": dict(trainer.lightning_module.hparams),
        "datamodule_hyper_parameters": {} if data is None else dict(data.hparams),
    }
    first_rank_does(trainer, lambda: refuse_objects(known))


def save_in_background(trainer: Trainer, path: str | Path, writer: BackgroundWriter, then: Callable[[], None]) -> None:
    """Leave it to a thread to copy a checkpoint to host memory, and to write it like :func:`save_whole`.

    What is not :func:`settled` is copied on return; for the rest see :meth:`BackgroundWriter.wait_for_copy`.

    Args:
        trainer: Trainer to save; every process must call this.
        path: Final path of the checkpoint, a file or a folder depending on the strategy, or an address.
        writer: The thread, without a write under way.
        then: What the first process does in the thread when the checkpoint is complete.

    Raises:
        InputError: On every process, when it has objects that no run could resume from.
    """
    strategy, is_first = trainer.strategy, trainer.is_global_zero
    to = place(strategy.broadcast(str(path)))
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    first_rank_does(trainer, lambda: refuse_objects(checkpoint))
    if not (writer.in_shards or is_first):
        return

    def write(copy: dict[str, Any]) -> None:
        if writer.in_shards:
            write_shards(copy, partial_of(to), writer.group)
        else:
            strategy.checkpoint_io.save_checkpoint(copy, str(partial_of(to)))
        if is_first:
            finish(to)
            then()

    writer.begin(to, checkpoint, write, settled(trainer))


def settled(trainer: Trainer) -> list[Tensor]:
    """The weights and states of the optimizers, unless something else than their steps may change them.

    That is code of a user which runs between two steps, or an optimizer that takes its steps in the backward pass.
    """
    module, callbacks = trainer.lightning_module, callbacks_of(trainer)
    hooks = [getattr(own, name) for own in (*callbacks, module) for name in _BETWEEN_STEPS]
    hooks.append(module.on_train_batch_end)  # that of callbacks precedes the save
    is_known = all(str(getattr(hook, "__module__", "")).split(".")[0] in _KNOWN for hook in hooks)
    if not is_known or any(isinstance(own, OptimizerInBackward) for own in callbacks):
        return []
    optimizers = [part for optimizer in trainer.optimizers for part in parts_of(optimizer)]
    weights = [weight for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]]
    states = [leaf for optimizer in optimizers for leaf in tree_leaves(list(optimizer.state.values()))]
    return weights + [leaf for leaf in states if isinstance(leaf, Tensor)]
