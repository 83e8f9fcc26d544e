"""The micro-batches of an optimizer step, and their sums over all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_sft.evaluation.metrics import NUM_SUMS, sums_by_part
from lightning_sft.machine.host_copy import HostCopy, without_waiting
from lightning_sft.model.experts import Routers
from lightning_sft.training.finite import FiniteGradient
from lightning_sft.training.throughput import NUM_COUNTS, StepMetrics
from lightning_sft.training.trainer import sum_over_ranks
from lightning_sft.types import Batch, InputError, LogLikelihood

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


_ROUNDING = 1e-4  # of a sum of float32 weights; a micro-batch more or less is far above it


@dataclass(frozen=True)
class StepSums:
    """The sums of an optimizer step, on the host.

    Args:
        micro_batches: Micro-batches of this rank, and the likelihood of each.
        counts: Sums of :meth:`~lightning_sft.training.throughput.StepMetrics.counts`.
        totals: Sums of all targets, and of those of each part of a mixture, ``[1 + parts, sums]``.
        of_routers: Sums of :meth:`~lightning_sft.model.experts.Routers.sums`; empty without experts.
    """

    micro_batches: list[tuple[Batch, LogLikelihood]]
    counts: Tensor
    totals: Tensor
    of_routers: Tensor

    def check_planned(self) -> None:
        """Refuse a step that is not made of the micro-batches that it was planned of.

        Raises:
            InputError: When the micro-batches are of several steps, or their targets do not add up.
        """
        planned = {(batch.normalizer, batch.step_weight) for batch, _ in self.micro_batches}
        weight, [(_, wanted), *others] = self.totals[0, 1].item(), planned
        if others or not math.isclose(weight, wanted or 0.0, rel_tol=_ROUNDING):
            raise InputError(
                f"The targets of this optimizer step weigh {weight:.6g}, but its batches have been planned for steps "
                f"that weigh {', '.join(sorted({f'{own or 0:.6g}' for _, own in planned}))}, so its gradient would "
                "not be a mean. Pass the SFTDataModule itself to trainer.fit, not its loaders; do not change "
                "trainer.accumulate_grad_batches during a fit, or leave out micro-batches of it; and set "
                "batch.normalizer = None on batches whose target_weights you change."
            )


class Window:
    """The micro-batches of the current optimizer step."""

    def __init__(self) -> None:
        self.micro_batches: list[tuple[Batch, LogLikelihood]] = []
        self.gradient = FiniteGradient()
        self._sums: HostCopy | None = None  # over all ranks, after the last micro-batch
        self._is_pending = False  # the loss of the newest micro-batch has not been differentiated
        self._closed: int | None = None  # the step that has been closed last
        self.is_repeated = False  # whether it has been closed before, by an optimizer that evaluates a step twice

    def add(self, batch: Batch, likelihood: LogLikelihood, begins: bool = False) -> None:
        """Keep a micro-batch, without the graph of its likelihood.

        Args:
            batch: The micro-batch.
            likelihood: Likelihood of the micro-batch.
            begins: Whether it is the first of a step; those of a step that an epoch ended within are forgotten.

        Raises:
            InputError: When the loss of the one before has not been differentiated.
        """
        self._check_differentiated()
        self._is_pending = True
        if begins:
            self.micro_batches, self._sums = [], None
        self.micro_batches.append((batch, likelihood.detached()))

    def differentiated(self) -> None:
        """The newest micro-batch has its part in the gradient."""
        self._is_pending = False

    def _check_differentiated(self) -> None:
        if self._is_pending:
            raise InputError(
                "training_step has returned None for a micro-batch, but its targets count in the step that it is part "
                "of. To leave rows out, set their target_weights to 0 and batch.normalizer to None, in "
                "on_after_batch_transfer."
            )

    def sum(self, trainer: Trainer, step_metrics: StepMetrics, routers: Routers | None) -> Tensor:
        """Sum over all ranks, in one reduction that goes to the host behind what the device has been given to do.

        Returns:
            The weight of the step, on the device.
        """
        batches, likelihoods = zip(*self.micro_batches, strict=True)
        local = torch.stack([sums_by_part(likelihood, batch) for batch, likelihood in self.micro_batches]).sum(0)
        counts = without_waiting(step_metrics.counts(list(batches)).to(local.dtype), local.device)
        of_routers = [] if routers is None else [routers.sums(likelihoods)]
        summed = sum_over_ranks(trainer, torch.cat([counts, local.flatten(), *of_routers, self.gradient.kept(local)]))
        self._sums = HostCopy(summed)
        return summed[NUM_COUNTS + 1]  # as totals[0, 1] in close

    def weight(self) -> float:
        """The weight of a complete step, for which the host waits."""
        assert self._sums is not None, "the step's last micro-batch has not been seen"
        return self._sums.wait()[NUM_COUNTS + 1].item()  # as totals[0, 1] in close

    def close(self, trainer: Trainer) -> StepSums | None:
        """The sums of the step, for which the host waits; ``None`` if it had no micro-batch, or has been closed before.

        Args:
            trainer: The Lightning trainer.

        Raises:
            InputError: When an optimizer evaluates a step of several micro-batches again.
            FloatingPointError: When the gradient of the step before was not finite.
        """
        micro_batches, self.micro_batches = self.micro_batches, []
        if not micro_batches:
            return None
        self._check_differentiated()
        self.is_repeated, self._closed = self._closed == trainer.global_step, trainer.global_step
        if self.is_repeated:  # at other weights; metrics are those of the first evaluation
            if trainer.accumulate_grad_batches > 1:
                raise InputError(
                    "The optimizer evaluates its closure more than once in a step, as SAM and L-BFGS do. With "
                    f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} the closure is the last "
                    "micro-batch alone. Set it to 1, with as many tokens per micro-batch as the step shall have."
                )
            return None
        assert self._sums is not None, "the step's last micro-batch has not been seen"
        summed, self._sums = self._sums.wait(), None
        num_sums = NUM_SUMS * (1 + len(micro_batches[0][0].part_names))
        counts, totals, of_routers, norm = summed.tensor_split([NUM_COUNTS, NUM_COUNTS + num_sums, len(summed) - 1])
        self.gradient.arrived(norm)
        return StepSums(micro_batches, counts, totals.view(-1, NUM_SUMS), of_routers)
