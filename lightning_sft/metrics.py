"""Corpus figures of the targets: exact sums on every rank, one packed reduction, one division."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sft.types import IGNORE, Batch, LogLikelihood


def sums(likelihood: LogLikelihood) -> Tensor:
    """``[Σ −w·log Pr, Σ w, correct targets, targets]`` of one batch, ``[4]`` float64 (float32 on MPS)."""
    dtype = torch.float32 if likelihood.total.device.type == "mps" else torch.float64
    correct = likelihood.correct.sum()
    targets = torch.full_like(correct, likelihood.correct.numel())
    return torch.stack([x.detach().to(dtype) for x in (-likelihood.total, likelihood.weight, correct, targets)])


def figures(totals: Tensor) -> dict[str, Tensor]:
    """What the sums over a corpus say: the token-weighted mean loss, and the share of targets predicted."""
    negative_log_likelihood, weight, correct, targets = totals.unbind()
    return {"loss": negative_log_likelihood / weight, "token_accuracy": correct / targets}


def sums_by_part(likelihood: LogLikelihood, batch: Batch | None) -> Tensor:
    """:func:`sums` of a batch, and below them those of each data set of its mixture: ``[1 + parts, 4]``."""
    everything = sums(likelihood)
    if batch is None or not batch.part_names:
        return everything[None]
    weights = batch.target_weights[batch.labels != IGNORE].to(everything)
    log_probs, correct = likelihood.log_probs.to(everything), likelihood.correct.to(everything)
    of_targets = torch.stack([-weights * log_probs, weights, correct, torch.ones_like(weights)], dim=1)  # [T, 4]
    of_parts = everything.new_zeros(len(batch.part_names), 4).index_add(0, batch.target_parts(), of_targets)
    return torch.cat([everything[None], of_parts])


def figures_by_part(totals: Tensor, part_names: Sequence[str]) -> dict[str, Tensor]:
    """:func:`figures` of a corpus, and the ``loss/name`` of each data set that has targets in it."""
    losses = {f"loss/{name}": figures(own)["loss"] for name, own in zip(part_names, totals[1:], strict=True) if own[1]}
    return figures(totals[0]) | losses


class CorpusLikelihood(Metric):
    """NLL per target token (``loss``), its exponential (``perplexity``) and ``token_accuracy`` of a whole corpus.

    Each is a sum over all batches and ranks divided once, so the split into batches cannot change it.

    Args:
        part_names: The data sets of the corpus, where it is a mixture: each gets a ``loss/name``.

    >>> import lightning_sft
    >>> metric = CorpusLikelihood()
    >>> hidden, head = torch.zeros(1, 2, 8), torch.zeros(4, 8)
    >>> metric.update(lightning_sft.log_likelihood(hidden, head, torch.tensor([[0, 1]])))
    >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
    {'loss': 1.386, 'token_accuracy': 0.5, 'perplexity': 4.0}
    """

    full_state_update = False
    totals: Tensor

    def __init__(self, part_names: Sequence[str] = ()) -> None:
        super().__init__()
        self.part_names = tuple(part_names)
        self.add_state("totals", torch.zeros(1 + len(part_names), 4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, likelihood: LogLikelihood, batch: Batch | None = None) -> None:
        """Add one batch; which data set a target is of, only the batch knows."""
        self.totals = self.totals + sums_by_part(likelihood, batch).to(self.totals)

    def compute(self) -> dict[str, Tensor]:
        """The figures of everything seen since the last reset."""
        values = figures_by_part(self.totals, self.part_names)
        return values | {"perplexity": values["loss"].exp()}
