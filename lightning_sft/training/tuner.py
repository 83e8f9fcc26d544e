"""What Lightning's tuner does to a run: it tries micro-batches of several sizes before a fit, or learning rates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lightning_sft.types import InputError

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer

ARGUMENT = "tokens_per_batch"


def tries_sizes(trainer: Trainer | None, streaming: bool) -> bool:
    """Whether ``Tuner.scale_batch_size`` is about to try values of ``tokens_per_batch`` in this fit.

    Args:
        trainer: That of Lightning, or ``None``.
        streaming: Whether the data are a stream.

    Raises:
        InputError: When they are: what is too long for a size that is tried would be lost.
    """
    callbacks = getattr(trainer, "callbacks", ())
    tries = any(getattr(callback, "_batch_arg_name", None) == ARGUMENT for callback in callbacks)
    if tries and streaming:
        raise InputError(
            "The tuner cannot try data.tokens_per_batch on a stream, whose longest sequence nobody knows. Try it with "
            "data.streaming=false, on a part of the data."
        )
    return tries


def check_tuner(callbacks: Iterable[Callback]) -> None:
    """Refuse what changes, once a fit has begun, the steps or the learning rate that its schedule was made for.

    Args:
        callbacks: Of the trainer. Those of a ``Tuner`` are its own, and end the fit that they try things in.

    Raises:
        InputError: With Lightning's finders as callbacks, and with ``StochasticWeightAveraging``, which copies the
            module before its model is there, and would average nothing.
    """
    instead = {
        "BatchSizeFinder": f"scale_batch_size(model, datamodule=data, batch_arg_name={ARGUMENT!r})",
        "LearningRateFinder": "lr_find(model, datamodule=data)",
    }
    for callback in callbacks:
        name = type(callback).__name__
        if name in instead and not getattr(callback, "_early_exit", False):
            raise InputError(
                f"{name} as a callback changes what the schedule has been made for. Call "
                f"Tuner(trainer).{instead[name]} of lightning.pytorch.tuner, and then trainer.fit."
            )
        if name == "StochasticWeightAveraging":
            raise InputError(
                "StochasticWeightAveraging copies the module before its model is loaded, and would average nothing. "
                "Use lightning.pytorch.callbacks.WeightAveraging, or EMAWeightAveraging."
            )
