"""What a data module asks its trainer before it reads, plans and shows data."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.batches.split_plan import default_tokens_per_batch
from lightning_sft.data.tokens.dataset import Split
from lightning_sft.training.trainer import on_cuda
from lightning_sft.types import InputError, Normalize


class TrainedData(LightningDataModule):
    """A data module that reads for the module of its trainer, or for none."""

    tokenizer: PreTrainedTokenizerBase | None
    splits: dict[str, Split]

    def _read(self, name: str | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer of what has been read.

        Args:
            name: Split that must have been read, too.

        Raises:
            InputError: When it has not been.
        """
        if self.tokenizer is None or (name is not None and name not in self.splits):
            raise InputError(
                "The data have not been read. Pass the data module itself, as trainer.fit(module, datamodule=data), "
                'not its loaders; to look at batches without a trainer, call data.setup("fit") first (or "validate", '
                '"test", "predict").'
            )
        return self.tokenizer

    @property
    def _module(self) -> Any:
        return None if self.trainer is None else self.trainer.lightning_module

    @property
    def _normalize(self) -> Normalize:
        normalize: Normalize = getattr(self._module, "normalize", "token")
        return normalize

    @property
    def _default_tokens(self) -> int:
        return default_tokens_per_batch(on_cuda(self.trainer))

    @property
    def _is_shown(self) -> bool:
        return self.trainer is None or bool(self.trainer.is_global_zero)
