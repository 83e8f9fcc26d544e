"""Corpus figures of the targets: exact sums on every rank, one packed reduction, one division."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sft.types import LogLikelihood


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


class CorpusLikelihood(Metric):
    """NLL per target token (``loss``), its exponential (``perplexity``) and ``token_accuracy`` of a whole corpus.

    Each is a sum over all batches and ranks divided once, so the split into batches cannot change it.

    >>> import lightning_sft
    >>> metric = CorpusLikelihood()
    >>> hidden, head = torch.zeros(1, 2, 8), torch.zeros(4, 8)
    >>> metric.update(lightning_sft.log_likelihood(hidden, head, torch.tensor([[0, 1]])))
    >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
    {'loss': 1.386, 'token_accuracy': 0.5, 'perplexity': 4.0}
    """

    full_state_update = False
    totals: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("totals", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, likelihood: LogLikelihood) -> None:
        """Add one batch."""
        self.totals = self.totals + sums(likelihood).to(self.totals)

    def compute(self) -> dict[str, Tensor]:
        """The figures of everything seen since the last reset."""
        values = figures(self.totals)
        return values | {"perplexity": values["loss"].exp()}
