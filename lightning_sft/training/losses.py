"""The loss of a target: −log Pr, or one of a subclass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sft.types import Batch, InputError

_ROUNDING = 1e-3  # of losses in float32 whose logits are in a matmul of another size


class TargetLosses:
    """Hooks of a module for the loss of a target, −log Pr unless a subclass overrides them.

    One step minimizes ``Σ_t w_t · loss_t / Z`` over the targets of all its micro-batches and ranks, whatever the loss
    is, so the gradient does not depend on how they are split. Validation and test measure −log Pr, which is comparable.
    """

    _has_checked_loss = False

    def target_loss(self, logits: Tensor, targets: Tensor, *inputs: Tensor) -> Tensor:
        """Loss of each target in training; override it to train on another.

        It is called on a few targets at a time, so the logits of a whole batch are never in memory: the loss of a
        target must not depend on the others. Only these logits get a gradient, and they may be changed in place.

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
        if not self.has_own_loss:
            return {}
        loss, inputs = self.target_loss, self.loss_inputs(batch)
        if any(values.requires_grad for values in inputs):
            raise InputError(
                f"{type(self).__name__}.loss_inputs gives a tensor that needs a gradient, but target_loss passes it to "
                "the logits alone. Detach the tensor, or override forward, as docs/howto/losses.md says."
            )
        return {"loss": loss if self._has_checked_loss else self._checked_loss, "loss_inputs": inputs}

    def _checked_loss(self, logits: Tensor, targets: Tensor, *inputs: Tensor) -> Tensor:
        """The loss of some targets, which is looked at until there are two at once."""
        states, node, given = _random_states(logits), logits.grad_fn, logits.detach().clone()  # as they are before
        losses = self.target_loss(logits, targets, *inputs)
        if isinstance(losses, Tensor) and losses.shape == targets.shape and len(targets) > 1:
            self._has_checked_loss = True
            trained = set(map(id, cast(nn.Module, self).parameters()))  # those of a teacher are its own
            if any(id(leaf) in trained for leaf in _leaves(losses, node)):
                raise InputError(
                    f"{type(self).__name__}.target_loss uses a parameter, which would not be trained: only the logits "
                    "get a gradient. Detach it, or override forward, as docs/howto/losses.md says."
                )
            if all(map(torch.equal, states, _random_states(logits))):  # else it may differ from call to call
                self._check_alone(losses.detach(), given, targets, *inputs)
        return losses

    def _check_alone(self, losses: Tensor, *given: Tensor) -> None:
        half = len(losses) // 2
        alone = self.target_loss(*(values[:half] for values in given)).detach()
        if not torch.allclose(alone, losses[:half], rtol=_ROUNDING, atol=_ROUNDING, equal_nan=True):
            most = int((alone - losses[:half]).abs().argmax())
            raise InputError(
                f"{type(self).__name__}.target_loss of a target depends on those it is given with: {losses[most]:.6g} "
                f"among {len(losses)}, {alone[most]:.6g} among {half}. They come in chunks (model.chunk_size), and "
                "the gradient would depend on these. Give each target a loss of its own; compute what they have in "
                "common in loss_inputs, or override forward."
            )


def _random_states(logits: Tensor) -> list[Tensor]:
    """States of the random generators that a loss may draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(logits.device)] if logits.is_cuda else states


def _leaves(losses: Tensor, of_logits: Any) -> Iterator[Tensor]:
    """Tensors that losses have a gradient for other than through this node of the graph, that of the logits."""
    left, seen = [losses.grad_fn], {of_logits, None}
    while left:
        node = left.pop()
        if node in seen or node is None:
            continue
        seen.add(node)
        left += [following for following, _ in node.next_functions]
        if isinstance(variable := getattr(node, "variable", None), Tensor):
            yield variable


def warn_of_unused_inputs(module: object) -> None:
    """Warn of a module that gives inputs of a loss, and trains on −log Pr, which takes none."""
    own = getattr(type(module), "loss_inputs", TargetLosses.loss_inputs)
    if own is not TargetLosses.loss_inputs and isinstance(module, TargetLosses) and not module.has_own_loss:
        rank_zero_warn(
            f"{type(module).__name__}.loss_inputs has no effect without a target_loss, to which they would be passed: "
            "the module trains on −log Pr. Override target_loss, too."
        )
