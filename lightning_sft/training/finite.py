"""A gradient that is not finite though the loss is, as of a square root at 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_sft.machine.host_copy import HostCopy

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class FiniteGradient:
    """Stops a fit at a non-finite gradient, which would make all weights NaN.

    On a CPU it is stopped before the update. On a device the host would have to wait for the backward pass: it looks at
    the norm one step later, or before a checkpoint is saved, so that no checkpoint ever holds such weights.
    """

    def __init__(self) -> None:
        self._norm: HostCopy | None = None
        self._step = 0

    def see(self, trainer: Trainer, norm: Tensor | None) -> None:
        """Look at the norm of a gradient, or at that of the step before.

        Args:
            trainer: The Lightning trainer.
            norm: Joint norm of the gradient of the step, before clipping; ``None`` if there is no gradient.

        Raises:
            FloatingPointError: When one is not finite, unless it is for a gradient scaler to leave out the step.
        """
        self.check(trainer)
        if norm is None or getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        self._norm, self._step = HostCopy(norm), trainer.global_step + 1
        if norm.device.type == "cpu":
            self._look("Nothing was updated with it.")

    def check(self, trainer: Trainer | None) -> None:
        """Look at the norm of the newest gradient, for which the host waits.

        Args:
            trainer: The Lightning trainer; after another error it is left at that.

        Raises:
            FloatingPointError: When it is not finite.
        """
        if trainer is not None and not trainer.interrupted:
            self._look("The weights are lost, and have not been saved: resume from the newest checkpoint.")

    def _look(self, so: str) -> None:
        norm, self._norm = self._norm, None
        if norm is None or norm.wait().isfinite():
            return
        raise FloatingPointError(
            f"The gradient of step {self._step:,} is NaN or infinite, but its loss is not. {so} Of a loss of your own, "
            "look at roots, logarithms and quotients: at 0 their derivatives are infinite, also where torch.where "
            "leaves them out. trainer.detect_anomaly=true names the operation. Of ours, lower the learning rate "
            "(model.optimizer.lr), or clip gradients (trainer.gradient_clip_val=1)."
        )
