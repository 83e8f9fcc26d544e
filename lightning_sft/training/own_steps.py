"""Steps of batches that a user's own loader has made: their weight is known when the last micro-batch has been seen."""

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
    """A module that divides a step by its weight: the loss where one micro-batch is the step, else the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self._complete: tuple[Callable[[], float], int] | None = None  # what waits for its weight; ranks averaged over
        self._undivided: Tensor | None = None  # the loss of the micro-batch under way, if its step has to be complete
        self._empty_steps: int | None = 0  # steps of this fit, none of which has had a target; None once one has

    def _to_divide(
        self, objective: Tensor, weight: Tensor | None, on_host: Callable[[], float], num_ranks: int
    ) -> Tensor:
        """The loss of a micro-batch without a normalizer; of several, the gradient is divided after the last one.

        Args:
            objective: Its ``− Σ_t w_t · log Pr(t)``.
            weight: ``Σ_t w_t`` of the step over all ranks, on the device, if this micro-batch is the last.
            on_host: Waits for this weight.
            num_ranks: Ranks that the strategy averages over.
        """
        accumulate = self.trainer.accumulate_grad_batches
        if accumulate == 1 and weight is not None:  # nothing waits: the device divides
            return objective * (num_ranks / torch.where(weight == 0, 1, weight).to(widest(weight.device))).to(objective)
        self._complete = None if weight is None else (on_host, num_ranks)
        self._undivided = objective * accumulate
        return self._undivided

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradient, and divide that of a complete step before any callback looks at it."""
        super().backward(loss, *args, **kwargs)
        complete, self._complete = self._complete, None
        if complete is None:
            return
        on_host, num_ranks = complete
        weight = on_host()
        for parameter in self.parameters() if weight else ():
            if parameter.grad is not None:
                parameter.grad.mul_(num_ranks / weight)

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
        """Refuse a loss that a subclass has added to, where the whole gradient will be divided.

        Args:
            loss: The loss that Lightning differentiates.

        Raises:
            InputError: With the ways to add one.
        """
        undivided, self._undivided = self._undivided, None
        if undivided is not None and not _is_multiple(loss, undivided):
            raise InputError(
                f"{type(self).__name__}.training_step changes the loss of SFTModule, and not by a factor. With batches "
                f"of your own loader and trainer.accumulate_grad_batches={self.trainer.accumulate_grad_batches}, the "
                "gradient is divided by the targets of the step when it is complete, and what is added would be "
                "divided with it. Add it in forward: return dataclasses.replace(likelihood, total=likelihood.total - "
                "likelihood.weight * auxiliary), as docs/howto/subclass.md does under An auxiliary loss. Or use "
                "SFTDataModule, which counts targets ahead, or trainer.accumulate_grad_batches=1."
            )


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
