"""Optimizers with two modes, as schedule-free ones: gradients are taken at other weights than those to evaluate.

Such an optimizer has the methods ``train`` and ``eval``, which move the parameters in place. Moving there and back
rounds, so the trained values are saved meanwhile and restored: a run does not depend on how often it is evaluated or
saved. A checkpoint has the weights to evaluate, as ``validate``, ``chat`` and ``export`` read them, and beside them
those to train.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sft.training.optimizers import parts_of
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import Strategy

TRAINED_KEY = "lightning_sft_trained_weights"
"""Checkpoint key of the training weights, where they differ from the evaluation weights."""


class Modes:
    """The mode of a module's optimizers; optimizers without modes are left alone.

    Args:
        module: Lightning module in a fit.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._kept: dict[str, Tensor] | None = None  # weights in training, while the parameters are those to evaluate
        self._restored: Mapping[str, Tensor] | None = None  # the same of a checkpoint, by name

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Take a checkpoint's weights in training, if they differ from those to evaluate."""
        self._restored = checkpoint.get(TRAINED_KEY)

    def begin(self) -> None:
        """Switch to training, from the checkpoint's weights in training if it has them."""
        self._kept = None if self._restored is None else dict(self._restored)
        self._restored = None
        self._train()

    def evaluate(self) -> None:
        """Give the parameters the values to evaluate."""
        if self._optimizers and self._kept is None:
            self._kept = {name: parameter.detach().clone() for name, parameter in self._trained()}
            for optimizer in self._optimizers:
                optimizer.eval()

    def train(self) -> None:
        """Give the parameters the values that they had, bit for bit."""
        if self._kept is not None:
            self._train()

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The values to evaluate, as long as the context lasts."""
        is_kept = self._kept is not None
        self.evaluate()
        try:
            yield
        finally:
            if not is_kept:
                self.train()

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Save both in a checkpoint: the evaluation weights as its weights, the training weights for resuming."""
        if not self._optimizers:
            return
        with self.evaluated():
            checkpoint["state_dict"] = {name: tensor.clone() for name, tensor in checkpoint["state_dict"].items()}
            if "optimizer_states" in checkpoint:
                assert self._kept is not None
                checkpoint[TRAINED_KEY] = dict(self._kept)

    @property
    def _optimizers(self) -> list[Any]:
        trainer = self._module._trainer
        parts = [] if trainer is None else [part for optimizer in trainer.optimizers for part in parts_of(optimizer)]
        return [part for part in parts if has_modes(part)]

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p) for name, p in self._module.named_parameters() if p.requires_grad)

    def _train(self) -> None:
        for optimizer in self._optimizers:
            optimizer.train()
        kept, self._kept = self._kept or {}, None
        with torch.no_grad():
            for name, parameter in self._trained():
                if name in kept:
                    parameter.copy_(kept[name])


def has_modes(optimizer: Optimizer) -> bool:
    """Whether an optimizer has a training and an evaluation mode."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def check_closures(module: LightningModule) -> None:
    """Refuse optimizers whose ``step`` takes no closure, with which Lightning computes the loss and its gradient.

    Args:
        module: Lightning module in a fit.

    Raises:
        InputError: With how ``step`` has to begin.
    """
    for optimizer in module.trainer.optimizers if module.automatic_optimization else ():
        taken = signature(optimizer.step).parameters.values()
        if not any(one.name == "closure" or one.kind is one.VAR_KEYWORD for one in taken):
            raise InputError(
                f"{type(optimizer).__name__}.step takes no closure, but under Lightning the loss and its gradient are "
                "computed by one. Declare step(self, closure=None), begin it with `with torch.enable_grad(): loss = "
                "closure()`, and return the loss."
            )


def check_strategy(optimizer: Optimizer, strategy: Strategy) -> None:
    """Refuse optimizers that a strategy would not train or save as they are.

    Raises:
        InputError: For one with modes where parameters are sharded; for several under DeepSpeed.
    """
    name = type(strategy).__name__
    modal = [type(part).__name__ for part in parts_of(optimizer) if has_modes(part)]
    if modal and strategy.restore_checkpoint_after_setup:
        raise InputError(
            f"{modal[0]} trains other weights than it evaluates, and {name} would save one of them. Use "
            "trainer.strategy=ddp, or an optimizer without modes, as torch.optim.AdamW."
        )
    if len(parts_of(optimizer)) > 1 and strategy.handles_gradient_accumulation:
        raise InputError(f"{name} shards the state of one optimizer. Use trainer.strategy=fsdp2, or model.optimizer.")
