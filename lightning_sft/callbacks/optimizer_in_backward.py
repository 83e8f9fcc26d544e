"""The optimiser's step of a parameter as soon as its gradient is complete: there are never all gradients at a time."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_sft.types import Batch, InputError


class OptimizerInBackward(Callback):
    """Updates a parameter in the backward pass, and lets go of its gradient: that saves the memory of the gradients.

    The weights are, to the bit, those of the ordinary step: the optimiser treats each parameter by itself, and nothing
    in the backward pass looks at a parameter after its gradient is complete. So there can be nothing between the
    gradients and the step that needs them all: no clipping by their norm, no accumulation, no sum over processes, no
    scaling of float16, no normaliser that is known only at the end. ``train/gradient_norm`` is not logged.
    """

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []
        self._is_sound = True

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what would not be exact, before anything is read.

        Raises:
            InputError: When something needs all gradients at a time.
        """
        if stage != "fit":
            return
        reasons = {
            "accumulates gradients. Set trainer.accumulate_grad_batches=1": trainer.accumulate_grad_batches != 1,
            "clips them. Set trainer.gradient_clip_val=null": bool(trainer.gradient_clip_val),
            "scales them. Use trainer.precision=bf16-mixed": trainer.precision == "16-mixed",
            "adds those of several processes. Use one device": not isinstance(trainer.strategy, SingleDeviceStrategy),
        }
        for reason, holds in reasons.items():
            if holds:
                raise InputError(
                    f"OptimizerInBackward lets go of each gradient at once, but this trainer {reason}, or leave the "
                    "callback out."
                )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to step in the backward pass.

        Raises:
            InputError: When the optimiser does not treat each parameter by itself.
        """
        [optimizer] = trainer.optimizers
        kind = type(optimizer)
        if not f"{kind.__module__}.".startswith("torch.optim.") or isinstance(optimizer, torch.optim.LBFGS):
            raise InputError(
                f"OptimizerInBackward needs an optimiser that treats each parameter by itself, and knows that of those "
                f"of torch but LBFGS; {kind.__name__} is another. Use torch.optim.AdamW, or leave the callback out."
            )

        def step(_: Tensor) -> None:
            if self._is_sound:
                optimizer.step()  # of all parameters, this one alone has a gradient
                optimizer.zero_grad()

        self._hooks = [hook_of(parameter, step) for parameter in pl_module.parameters() if parameter.requires_grad]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Refuse a batch whose step would have to be normalised when all its gradients are there.

        Raises:
            InputError: When nobody has planned ahead.
        """
        if Batch.of(batch).normalizer is None:
            raise InputError("OptimizerInBackward needs batches of SFTDataModule: it cannot normalise gradients late.")

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """With a loss that is no number nothing is updated; the module stops at it when the backward pass is done."""
        self._is_sound = bool(torch.isfinite(loss))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the parameters as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def hook_of(parameter: nn.Parameter, function: Any) -> RemovableHandle:
    """Call a function whenever the gradient of a parameter is complete."""
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(function)
    return handle
