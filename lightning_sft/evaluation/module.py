"""Validation and test: metrics of whole data sets, whatever their batches, ranks and loaders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_sft.evaluation.metrics import CorpusLikelihood
from lightning_sft.evaluation.token_bytes import token_bytes
from lightning_sft.training.checks import not_finite
from lightning_sft.training.optimizer_modes import Modes
from lightning_sft.training.own_batches import OwnBatches
from lightning_sft.training.trainer import datamodule_of
from lightning_sft.types import Batch, LogLikelihood, widest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Outputs = dict[str, LogLikelihood]
"""Outputs of a step: the ``likelihood`` of its batch, for a callback's ``on_validation_batch_end``."""


class EvaluatedModule(LightningModule):
    """A module whose validation and test log the metrics of whole data sets.

    Its ``forward`` computes the :class:`~lightning_sft.types.LogLikelihood` of a batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._evaluation, self._own_batches, self._modes = _Evaluation(), OwnBatches(), Modes(self)
        self._of_step: set[str] = set()  # names of the training metrics of the last step

    def _received(self, batch: Batch | Mapping[str, Any]) -> Batch:
        """A batch, or what a collator of transformers makes, as a checked batch."""
        received = Batch.of(batch)
        counted = not isinstance(batch, Batch) and batch.get("position_ids") is None
        self._own_batches.check(self, received, counted)
        return received

    def on_validation_start(self) -> None:
        """Reset the validation metrics."""
        self._evaluation.begin(self, len(self.trainer.num_val_batches))

    def validation_step(self, batch: Batch | Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Outputs:
        """Add a batch to the validation metrics of its loader, and hand its likelihood to callbacks."""
        return {"likelihood": self._evaluation.add(self, self._received(batch), dataloader_idx)}

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole validation set."""
        self._log_metrics("val", self._evaluation.close(self), sync_dist=True)

    def on_validation_model_eval(self) -> None:
        """Switch to the weights that the optimizer evaluates, if it has such a mode."""
        super().on_validation_model_eval()
        if self.trainer.state.fn == "fit":
            self._modes.evaluate()

    def on_validation_model_train(self) -> None:
        """Switch back to the weights that are trained."""
        super().on_validation_model_train()
        if self.trainer.state.fn == "fit":
            self._modes.train()

    def on_train_end(self) -> None:
        """Leave the weights to evaluate in the model."""
        self._modes.evaluate()

    def evaluated(self) -> AbstractContextManager[None]:
        """A context with the weights to evaluate, which differ from those in training with schedule-free optimizers."""
        return self._modes.evaluated()

    def on_test_start(self) -> None:
        """Reset the test metrics."""
        self._evaluation.begin(self, len(self.trainer.num_test_batches))

    def test_step(self, batch: Batch | Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Outputs:
        """Add a batch to the test metrics of its loader, and hand its likelihood to callbacks."""
        return {"likelihood": self._evaluation.add(self, self._received(batch), dataloader_idx)}

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole test set."""
        self._log_metrics("test", self._evaluation.close(self), sync_dist=True)

    def _log_metrics(self, name: str, values: Mapping[str, Tensor], sync_dist: bool = False) -> None:
        # sync_dist avoids a warning of Lightning; the values are the same on all ranks
        for key, value in values.items():
            settings: dict[str, Any] = {"batch_size": 1, "sync_dist": sync_dist, "add_dataloader_idx": False}
            self.log(f"{name}/{key}", value.float(), prog_bar=key == "loss", **settings)

    def _forget_metrics(self, renewed: Iterable[str]) -> None:
        """Remove the training metrics of the last step that this one does not have: Lightning would log them again."""
        stale, self._of_step = self._of_step.difference(renewed), set(renewed)
        results = cast(Any, self.trainer)._results
        for key in [key for key, item in results.items() if item.meta.name.removeprefix("train/") in stale]:
            del results[key]


class _Evaluation:
    """Accumulates the metrics of each loader's batches over its whole data set; reused by the next evaluation."""

    def __init__(self) -> None:
        self._metrics: list[CorpusLikelihood] = []  # one a loader
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._token_bytes: Tensor | None = None  # of its vocabulary
        self._not_finite: list[tuple[Batch, LogLikelihood]] = []  # batches whose loss is non-finite

    def begin(self, module: LightningModule, num_loaders: int) -> None:
        """Forget an evaluation that was interrupted, and see what the tokens stand for.

        Args:
            module: The Lightning module.
            num_loaders: Number of evaluation loaders of the trainer.
        """
        tokenizer = getattr(datamodule_of(module.trainer), "tokenizer", None)
        if tokenizer is not self._tokenizer:  # going through a vocabulary takes a second
            self._tokenizer, self._token_bytes = tokenizer, token_bytes(tokenizer)
        self._metrics = [self._new_metric(module.device) for _ in range(num_loaders)]
        self._not_finite = []

    def add(self, module: LightningModule, batch: Batch, loader: int = 0) -> LogLikelihood:
        """Compute the likelihood of a batch, and add it to the metrics of its loader."""
        if batch.part_names != self._metrics[loader].part_names:  # the first batch of a mixture
            self._metrics[loader] = self._new_metric(module.device, batch.part_names)
        likelihood: LogLikelihood = module(batch)
        self._metrics[loader].update(likelihood, batch)
        if not torch.isfinite(likelihood.total):
            self._not_finite.append((batch, likelihood))
        return likelihood

    def _new_metric(self, device: torch.device, part_names: Sequence[str] = ()) -> CorpusLikelihood:
        return CorpusLikelihood(part_names, self._token_bytes, widest(device)).to(device)

    def close(self, module: LightningModule) -> dict[str, Tensor]:
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
