"""A gradient that is not finite though the loss is, as of a square root at 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class FiniteGradient:
    """Stops a fit at a non-finite gradient, which would make all weights NaN.

    On a CPU it is stopped before the update. On a device the host would have to wait for the backward pass: there the
    norm comes to the host with the sums of the next step, or is looked at before a checkpoint is saved, so that no
    checkpoint ever holds such weights.
    """

    def __init__(self) -> None:
        self._norm: Tensor | None = None  # of a step, which the host has not looked at
        self._step = 0

    def see(self, trainer: Trainer, norm: Tensor | None) -> None:
        """Look at the norm of a gradient on a CPU, and keep that of a device for later.

        Args:
            trainer: The Lightning trainer.
            norm: Joint norm of the gradient of the step, before clipping; ``None`` if there is no gradient.

        Raises:
            FloatingPointError: When it is not finite, unless it is for a gradient scaler to leave out the step.
        """
        if norm is None or getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        self._norm, self._step = norm, trainer.global_step + 1
        if norm.device.type == "cpu":
            self._look(norm, "Nothing was updated with it.")

    def kept(self, like: Tensor) -> Tensor:
        """The norm that has been kept, as a tensor ``[1]`` of the dtype and device of another; 0 if there is none."""
        return like.new_zeros(1) if self._norm is None else self._norm.detach().to(like).reshape(1)

    def arrived(self, norm: Tensor) -> None:
        """Look at the norm that has been kept.

        Args:
            norm: What :meth:`kept` has given, summed over ranks, on the host.

        Raises:
            FloatingPointError: When it is not finite.
        """
        self._look(norm, "The weights are lost, and have not been saved: resume from the newest checkpoint.")

    def check(self, trainer: Trainer | None) -> None:
        """Look at the norm that has been kept, before a checkpoint is saved; the host waits for it.

        Args:
            trainer: The Lightning trainer; after another error it is left at that.

        Raises:
            FloatingPointError: When it is not finite.
        """
        if trainer is not None and not trainer.interrupted and self._norm is not None:
            self.arrived(self._norm)

    def _look(self, norm: Tensor, so: str) -> None:
        self._norm = None
        if norm.isfinite():
            return
        raise FloatingPointError(
            f"The gradient of step {self._step:,} is NaN or infinite, but its loss is not. {so} Of a loss of your own, "
            "look at roots, logarithms and quotients: at 0 their derivatives are infinite, also where torch.where "
            "leaves them out. trainer.detect_anomaly=true names the operation. Of ours, lower the learning rate "
            "(model.optimizer.lr), or clip gradients (trainer.gradient_clip_val=1)."
        )
