"""The figures of a validation or a test while it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sft.data.token_bytes import token_bytes
from lightning_sft.guards import not_finite
from lightning_sft.metrics import CorpusLikelihood
from lightning_sft.types import Batch, LogLikelihood, widest


class Evaluation:
    """Adds up what batches say of the whole data set; used again for the next time."""

    def __init__(self) -> None:
        self._metric = CorpusLikelihood()
        self._tokenizer: Any = None
        self._token_bytes: Tensor | None = None  # of its vocabulary
        self._not_finite: list[tuple[Batch, LogLikelihood]] = []  # of the batches, those whose loss is no number

    def begin(self, module: Any) -> None:
        """Forget an evaluation that was interrupted, and see what the tokens stand for.

        Args:
            module: The Lightning module.
        """
        tokenizer = getattr(module.trainer.datamodule, "tokenizer", None)
        if tokenizer is not self._tokenizer:  # going through a vocabulary takes a second
            self._tokenizer, self._token_bytes = tokenizer, token_bytes(tokenizer)
        self._metric = self._new_metric(module.device)
        self._not_finite = []

    def add(self, module: Any, batch: Batch | Mapping[str, Any]) -> None:
        """Compute the likelihood of a batch, and add it."""
        batch = Batch.of(batch)
        if batch.part_names != self._metric.part_names:  # the first batch of a mixture
            self._metric = self._new_metric(module.device, batch.part_names)
        likelihood: LogLikelihood = module(batch)
        self._metric.update(likelihood, batch)
        if not torch.isfinite(likelihood.total):
            self._not_finite.append((batch, likelihood))

    def _new_metric(self, device: torch.device, part_names: Sequence[str] = ()) -> CorpusLikelihood:
        return CorpusLikelihood(part_names, self._token_bytes, widest(device)).to(device)

    def close(self, module: Any) -> dict[str, Tensor]:
        """The figures, the same on all ranks.

        Raises:
            FloatingPointError: When the loss is NaN or infinite; with the samples of all ranks that it comes from.
        """
        values, bad, self._not_finite = self._metric.compute(), self._not_finite, []
        if not torch.isfinite(values["loss"]):
            raise not_finite(bad, module)
        return values
