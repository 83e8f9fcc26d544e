"""The metrics of a validation or a test while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sft.evaluation.metrics import CorpusLikelihood
from lightning_sft.evaluation.token_bytes import token_bytes
from lightning_sft.training.checks import not_finite
from lightning_sft.types import Batch, LogLikelihood, widest


class EvaluationMetrics:
    """Accumulates the metrics of each loader's batches over its whole data set; reused by the next evaluation."""

    def __init__(self) -> None:
        self._metrics: list[CorpusLikelihood] = []  # one a loader
        self._tokenizer: Any = None
        self._token_bytes: Tensor | None = None  # of its vocabulary
        self._not_finite: list[tuple[Batch, LogLikelihood]] = []  # batches whose loss is non-finite

    def begin(self, module: Any, num_loaders: int) -> None:
        """Forget an evaluation that was interrupted, and see what the tokens stand for.

        Args:
            module: The Lightning module.
            num_loaders: Number of evaluation loaders of the trainer.
        """
        tokenizer = getattr(module.trainer.datamodule, "tokenizer", None)
        if tokenizer is not self._tokenizer:  # going through a vocabulary takes a second
            self._tokenizer, self._token_bytes = tokenizer, token_bytes(tokenizer)
        self._metrics = [self._new_metric(module.device) for _ in range(num_loaders)]
        self._not_finite = []

    def add(self, module: Any, batch: Batch | Mapping[str, Any], loader: int = 0) -> None:
        """Compute the likelihood of a batch, and add it to the metrics of its loader."""
        batch = Batch.of(batch)
        if batch.part_names != self._metrics[loader].part_names:  # the first batch of a mixture
            self._metrics[loader] = self._new_metric(module.device, batch.part_names)
        likelihood: LogLikelihood = module(batch)
        self._metrics[loader].update(likelihood, batch)
        if not torch.isfinite(likelihood.total):
            self._not_finite.append((batch, likelihood))

    def _new_metric(self, device: torch.device, part_names: Sequence[str] = ()) -> CorpusLikelihood:
        return CorpusLikelihood(part_names, self._token_bytes, widest(device)).to(device)

    def close(self, module: Any) -> dict[str, Tensor]:
        """The metrics, the same on all ranks; of several loaders with the suffix that Lightning gives to its own.

        Raises:
            FloatingPointError: When the loss is NaN or infinite; with the samples of all ranks that it comes from.
        """
        bad, self._not_finite = self._not_finite, []
        values: dict[str, Tensor] = {}
        for number, metric in enumerate(self._metrics):
            suffix = f"/dataloader_idx_{number}" if len(self._metrics) > 1 else ""
            found = metric.compute()
            if not torch.isfinite(found["loss"]):
                raise not_finite(bad, module)
            values |= {f"{name}{suffix}": value for name, value in found.items()}
        return values
