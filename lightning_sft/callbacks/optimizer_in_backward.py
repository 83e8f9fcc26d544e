"""The optimizer's step of a parameter as soon as its gradient is ready: the full set of gradients never exists."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_sft.training.optimizers import parts_of
from lightning_sft.types import Batch, InputError


class OptimizerInBackward(Callback):
    """Updates a parameter in the backward pass and frees its gradient: that saves the memory of the gradients.

    The weights are bit for bit those of the ordinary step: the optimizer treats each parameter by itself, and nothing
    in the backward pass looks at a parameter after its gradient is ready. So there can be nothing between the gradients
    and the step that needs them all: no clipping by their norm, no accumulation, no sum over processes, no scaling of
    float16, no normalizer that is known only at the end. ``train/gradient_norm`` is not logged.

    On a GPU each backward pass begins with a wait for the loss, which has to be known to be finite before anything is
    updated; the ordinary step has no such wait.
    """

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []
        self._is_sound = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
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
                    f"OptimizerInBackward frees each gradient at once, but this trainer {reason}, or leave the "
                    "callback out."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to step in the backward pass.

        Raises:
            InputError: When the optimizer does not treat each parameter by itself.
        """
        [whole] = trainer.optimizers
        for kind in map(type, parts_of(whole)):
            if not f"{kind.__module__}.".startswith("torch.optim.") or issubclass(kind, torch.optim.LBFGS):
                raise InputError(
                    f"OptimizerInBackward needs an optimizer that treats each parameter by itself, and knows that of "
                    f"those of torch but LBFGS; {kind.__name__} is another. Use torch.optim.AdamW, or leave the "
                    "callback out."
                )

        def step(parameter: Tensor, optimizer: torch.optim.Optimizer, group: int) -> None:
            if self._is_sound:
                with only(optimizer, parameter, group):
                    optimizer.step()
                    optimizer.zero_grad()

        self._hooks = [
            hook_of(parameter, partial(step, optimizer=optimizer, group=number))
            for optimizer in parts_of(whole)
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
            if parameter.requires_grad
        ]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Refuse a batch whose step would have to be normalized when all its gradients are there.

        Raises:
            InputError: When nobody has planned ahead.
        """
        if Batch.of(batch).normalizer is None:
            raise InputError("OptimizerInBackward needs batches of SFTDataModule: it cannot normalize gradients late.")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """A non-finite loss updates nothing; the module stops at it when the backward pass is done."""
        self._is_sound = bool(torch.isfinite(loss))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the parameters as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


@contextmanager
def only(optimizer: torch.optim.Optimizer, parameter: Tensor, group: int) -> Iterator[None]:
    """Let an optimizer see one parameter, with the settings of its group at this moment.

    Its steps would otherwise walk over all n parameters to find the one that has a gradient, n times in a backward
    pass: 110 ms for 1.6 ms of updates were measured. Its state, and the groups that it and its schedule keep, stay as
    they are.

    Args:
        optimizer: One that only reads its groups in a step, as those of torch do.
        parameter: The one.
        group: Number of its group.
    """
    groups = optimizer.param_groups
    optimizer.param_groups = [{**groups[group], "params": [parameter]}]
    try:
        yield
    finally:
        optimizer.param_groups = groups


def hook_of(parameter: nn.Parameter, function: Any) -> RemovableHandle:
    """Call a function whenever the gradient of a parameter is ready."""
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(function)
    return handle
