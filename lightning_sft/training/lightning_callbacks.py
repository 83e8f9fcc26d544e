"""Callbacks of Lightning under which steps would not be the planned ones, or that would have no effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.parsing import lightning_hasattr

from lightning_sft.io.named import OurNames
from lightning_sft.training.trainer import callbacks_of, datamodule_of
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_BATCH_SIZE = "tokens_per_batch"
_FINDERS = {
    "BatchSizeFinder": f"scale_batch_size(model, datamodule=data, batch_arg_name={_BATCH_SIZE!r})",
    "LearningRateFinder": "lr_find(model, datamodule=data)",
}
_SCALE = f"Call Tuner(trainer).{_FINDERS['BatchSizeFinder']}"
_OTHERS = {
    "GradientAccumulationScheduler": (
        "changes how many micro-batches a step has after steps have been planned. Use a constant "
        "trainer.accumulate_grad_batches"
    ),
    "StochasticWeightAveraging": (
        "copies the module before its model is loaded, and would average nothing. Use "
        "lightning.pytorch.callbacks.WeightAveraging, or EMAWeightAveraging"
    ),
    "BaseFinetuning": (
        "freezes the module before its model is loaded, and would freeze nothing. Set model.frozen or model.trained to "
        "patterns of parameters"
    ),
    "ModelPruning": (
        "looks for parameters before the model is loaded, and would prune none. Prune the model that training starts "
        "from, or an export"
    ),
}


def check_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks that change steps or learning rates after they are planned, look into the module too early, or
    write over each other.

    Args:
        trainer: Lightning trainer of a fit. A ``Tuner`` adds callbacks, which end their trial fit; those are allowed.

    Raises:
        InputError: With a tuner that scales what is not there, or would see a part of each step; with Lightning's
            finders as callbacks, or those that change the accumulation, average weights by copying the module, freeze
            or prune it; also with classes derived from theirs. And with two of ours that write the same files.
    """
    written: set[tuple[str, str]] = set()
    for callback in callbacks_of(trainer):
        if isinstance(callback, OurNames) and hasattr(callback, "dirpath") and not isinstance(callback, Checkpoint):
            place = type(callback).__name__, str(callback.dirpath)
            if place in written:
                raise InputError(
                    f"Two callbacks {place[0]} write to the same folder, and over each other's lines. Remove one, or "
                    "give it a dirpath of its own."
                )
            written.add(place)
        scaled = getattr(callback, "_batch_arg_name", None)
        if (
            scaled
            and not lightning_hasattr(trainer.lightning_module, scaled)
            and hasattr(datamodule_of(trainer), _BATCH_SIZE)
        ):
            raise InputError(f"The tuner would scale {scaled!r}, which neither the module nor the data have. {_SCALE}.")
        kinds = [base.__name__ for base in type(callback).__mro__]
        for kind in kinds:
            if kind in _FINDERS and not getattr(callback, "_early_exit", False):
                raise InputError(
                    f"{kind} as a callback changes what the schedule has been made for. Call "
                    f"Tuner(trainer).{_FINDERS[kind]} of lightning.pytorch.tuner, and then trainer.fit."
                )
            if kind == "LearningRateFinder" and (accumulate := trainer.accumulate_grad_batches) > 1:
                raise InputError(
                    "Tuner.lr_find reads the loss of the last micro-batch of a step, which with trainer."
                    f"accumulate_grad_batches={accumulate} is a part of the step's. Give it a Trainer with 1, and data "
                    f"with {accumulate} times the tokens_per_batch, or the batches of your loader {accumulate} times "
                    "as large."
                )
            if kind in _OTHERS:
                raise InputError(f"{kinds[0]} {_OTHERS[kind]}.")


def tries_sizes(trainer: Trainer | None, streaming: bool) -> bool:
    """Whether ``Tuner.scale_batch_size`` is about to try values of ``tokens_per_batch`` in this fit.

    Args:
        trainer: Lightning trainer, or ``None``.
        streaming: Whether the data are a stream.

    Raises:
        InputError: If they are: sequences too long for a size that is tried would be lost.
    """
    callbacks = getattr(trainer, "callbacks", ())
    tries = any(getattr(callback, "_batch_arg_name", None) == _BATCH_SIZE for callback in callbacks)
    if tries and streaming:
        raise InputError(
            "The tuner cannot try data.tokens_per_batch on a stream, whose longest sequence nobody knows. Try it with "
            "data.streaming=false, on a part of the data."
        )
    return tries
