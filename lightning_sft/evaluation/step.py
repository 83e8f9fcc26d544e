"""The sums of an optimizer step: over its micro-batches and all ranks, in one reduction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_sft.evaluation.metrics import NUM_SUMS, metrics_by_part, sums_by_part
from lightning_sft.machine.host_copy import HostCopy, without_waiting
from lightning_sft.training.trainer import sum_over_ranks
from lightning_sft.types import Batch, LogLikelihood

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_sft.model.experts import Routers


class StepSums:
    """Sums of a step over all ranks, on their way to the host while the device works on the backward pass.

    Args:
        trainer: Lightning trainer.
        window: Micro-batches of the step on this rank, with their likelihoods.
        counts: Counts of this rank, as :meth:`~lightning_sft.training.throughput.StepMetrics.counts` returns them.
        routers: Routers of a mixture of experts, or ``None``.
    """

    def __init__(
        self,
        trainer: Trainer,
        window: Sequence[tuple[Batch, LogLikelihood]],
        counts: Tensor,
        routers: Routers | None = None,
    ) -> None:
        self._part_names, self._routers = window[0][0].part_names, routers
        local = torch.stack([sums_by_part(likelihood, batch) for batch, likelihood in window]).sum(0)
        summands = [without_waiting(counts.to(local.dtype), local.device), local.flatten()]
        if routers is not None:
            summands.append(routers.sums([likelihood for _, likelihood in window]))
        self._ends = [len(counts), len(counts) + local.numel()]
        self._copy = HostCopy(sum_over_ranks(trainer, torch.cat(summands)))

    def wait(self) -> None:
        """Wait until the sums are on the host; what follows reads them."""
        self.counts, totals, self._of_routers = self._copy.wait().tensor_split(self._ends)
        self._totals = totals.view(-1, NUM_SUMS)

    @property
    def is_finite(self) -> bool:
        """Whether the loss is a finite number."""
        return bool(torch.isfinite(self._totals[0, 0]))

    @property
    def weight(self) -> float:
        """Σ_t w_t of the step."""
        return self._totals[0, 1].item()

    @property
    def num_targets(self) -> Tensor:
        """Number of target tokens, a scalar."""
        return self._totals[0, 3]

    def metrics(self) -> dict[str, Tensor]:
        """Metrics of the targets, of each data set of a mixture, and of experts."""
        found = metrics_by_part(self._totals, self._part_names)
        return found if self._routers is None else found | self._routers.metrics(self._of_routers, self.weight)
