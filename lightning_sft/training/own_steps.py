"""Steps of batches that a user's own loader has made: their weight is known when they are complete."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_sft.io.words import counted
from lightning_sft.training.trainer import is_last_step
from lightning_sft.types import IGNORE, InputError, widest

if TYPE_CHECKING:
    from torch.autograd.graph import Node

_LINEAR = ("Div", "Mul", "Neg", "Add", "Sub", "Rsub", "ToCopy", "Clone", "View", "Squeeze", "Unsqueeze", "Sum", "Mean")


class OwnSteps(LightningModule):
    """A module whose gradient is divided by the weight of the step as soon as that is known."""

    def __init__(self) -> None:
        super().__init__()
        self._late: tuple[Callable[[], float], int] | None = None  # weight of a complete step, and its ranks
        self._weight: Tensor | None = None  # the same weight on the device
        self._undivided: Tensor | None = None  # the loss of the micro-batch under way, if its step has to be complete
        self._empty_steps: int | None = 0  # steps of this fit, none of which has had a target; None once one has

    def _divided(
        self, objective: Tensor, weight: Tensor | None, on_host: Callable[[], float], num_ranks: int
    ) -> Tensor:
        """The loss of a micro-batch without a normalizer.

        Args:
            objective: Its ``− Σ_t w_t · log Pr(t)``.
            weight: ``Σ_t w_t`` of the step over all ranks, on the device, if this micro-batch is the last.
            on_host: Waits for this weight.
            num_ranks: Ranks that the strategy averages over.
        """
        self._late, self._weight = None if weight is None else (on_host, num_ranks), weight
        self._undivided = objective * self.trainer.accumulate_grad_batches
        return self._undivided

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradient, and divide that of a complete step before any callback looks at it."""
        super().backward(loss, *args, **kwargs)
        late, self._late = self._late, None
        if late is not None and (weight := late[0]()):
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(late[1] / weight)

    def on_train_start(self) -> None:
        """Count the steps without targets of this fit."""
        self._empty_steps = 0

    def _count_step(self, weight: float) -> None:
        """Count a step, of all ranks, whose targets weigh so much.

        Raises:
            InputError: At the end of an epoch or of the fit, when no step has had a target.
        """
        self._empty_steps = None if weight or self._empty_steps is None else self._empty_steps + 1
        if is_last_step(self.trainer):
            self._check_targets()

    def _check_targets(self) -> None:
        if self._empty_steps:
            raise InputError(
                f"No token is a target in the first {counted(self._empty_steps, 'step')} of this fit, on any device: "
                f"all labels of your batches are {IGNORE}, or weigh 0, so nothing has been learned. Look at the labels "
                "of a batch: a collator that masks prompts leaves none where it does not find where answers begin, or "
                "where rows were cut before them."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save a model in which nothing was trained as trained, except while another error ends the fit.

        Args:
            checkpoint: The checkpoint.

        Raises:
            InputError: When no step has had a target.
        """
        if self._trainer is not None and not self.trainer.interrupted:
            self._check_targets()

    def on_before_backward(self, loss: Tensor) -> None:
        """Refuse a loss that a subclass has added to one that is divided at the end: it would be divided with it.

        Args:
            loss: The loss that Lightning differentiates.

        Raises:
            InputError: With the ways to add one.
        """
        undivided, self._undivided = self._undivided, None
        if undivided is None or _is_multiple(loss, undivided):
            return
        if self.trainer.accumulate_grad_batches > 1 or self._weight is None or self._late is None:
            raise InputError(
                f"{type(self).__name__}.training_step changes the loss of SFTModule, and not by a factor. With batches "
                f"of your own loader and trainer.accumulate_grad_batches={self.trainer.accumulate_grad_batches}, the "
                "gradient is divided by the targets of the step when it is complete, and what is added would be "
                "divided with it. Add it in forward: return dataclasses.replace(likelihood, total=likelihood.total - "
                "likelihood.weight * auxiliary), as docs/howto/subclass.md does under An auxiliary loss. Or use "
                "SFTDataModule, which counts targets ahead, or trainer.accumulate_grad_batches=1."
            )
        divisor = torch.where(self._weight == 0, 1, self._weight).to(widest(self._weight.device))
        factor, self._late = (self._late[1] / divisor).to(undivided), None
        undivided.register_hook(lambda gradient: gradient * factor)  # of the loss of the targets alone


def _is_multiple(loss: Tensor, of: Tensor) -> bool:
    """Whether the gradient of a loss is that of another times a number, as the graph has it; no value is looked at."""
    node: Node | None
    node, number = loss.grad_fn, loss.output_nr
    while node is not None and node is not of.grad_fn:
        following = node.next_functions
        if node.name().startswith("_DDPSink"):  # passes all that a training step returns
            following = following[number : number + 1]
        elif not node.name().startswith(_LINEAR):
            return False
        with_graph: list[Any] = [pair for pair in following if pair[0] is not None]
        if len(with_graph) != 1:
            return False
        [(node, number)] = with_graph
    return node is of.grad_fn
