"""What a data module asks its trainer before it reads, plans and shows data."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule

from lightning_sft.data.batches.split_plan import default_tokens_per_batch
from lightning_sft.training.trainer import on_cuda
from lightning_sft.types import Normalize


class TrainedData(LightningDataModule):
    """A data module that reads for the module of its trainer, or for none."""

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
