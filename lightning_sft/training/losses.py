"""The loss of a target: −log Pr, or one of a subclass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from lightning_sft.types import Batch


class TargetLosses:
    """Hooks of a module for the loss of a target, −log Pr unless a subclass overrides them.

    One step minimizes ``Σ_t w_t · loss_t / Z`` over the targets of all its micro-batches and ranks, whatever the loss
    is, so the gradient does not depend on how they are split. Validation and test measure −log Pr, which is comparable.
    """

    def target_loss(self, logits: Tensor, targets: Tensor, *inputs: Tensor) -> Tensor:
        """Loss of each target in training; override it to train on another.

        It is called on a few targets at a time, so the logits of a whole batch are never in memory. Only these logits
        get a gradient, and they may be changed in place.

        Args:
            logits: Logits of some targets, ``[T, V]``, scaled and soft-capped as in the model, in float32 or float64.
            targets: Target tokens, ``[T]``.
            inputs: Values of :meth:`loss_inputs` at these targets, ``[T, *]`` each.

        Returns:
            Loss of each target, ``[T]``.
        """
        return F.cross_entropy(logits, targets, reduction="none")

    def loss_inputs(self, batch: Batch) -> Sequence[Tensor]:
        """Tensors ``[B, N, *]`` with a value for each position of a batch, which :meth:`target_loss` gets at targets.

        Args:
            batch: Micro-batch of training.
        """
        return ()

    @property
    def has_own_loss(self) -> bool:
        """Whether a subclass trains on another loss than −log Pr."""
        return type(self).target_loss is not TargetLosses.target_loss

    def own_loss(self, batch: Batch) -> dict[str, Any]:
        """Arguments of the likelihood of a micro-batch for the loss of a subclass.

        There are none without one: value and gradient of −log Pr are known in closed form.
        """
        return {"loss": self.target_loss, "loss_inputs": self.loss_inputs(batch)} if self.has_own_loss else {}


def warn_of_unused_inputs(module: object) -> None:
    """Warn of a module that gives inputs of a loss, and trains on −log Pr, which takes none."""
    own = getattr(type(module), "loss_inputs", TargetLosses.loss_inputs)
    if own is not TargetLosses.loss_inputs and isinstance(module, TargetLosses) and not module.has_own_loss:
        rank_zero_warn(
            f"{type(module).__name__}.loss_inputs has no effect without a target_loss, to which they would be passed: "
            "the module trains on −log Pr. Override target_loss, too."
        )
