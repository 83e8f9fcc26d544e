"""Supervised fine-tuning of language models with PyTorch Lightning: exact, with parity, fast."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Batch", "Mixture", "Part", "SFTDataModule", "SFTModule", "__version__", "log_likelihood"]

if TYPE_CHECKING:
    from lightning_sft.data.rows.mixture import Mixture, Part
    from lightning_sft.datamodule import SFTDataModule
    from lightning_sft.module import SFTModule
    from lightning_sft.objective import log_likelihood
    from lightning_sft.types import Batch

_HOMES = {
    "Batch": "types",
    "Mixture": "data.rows.mixture",
    "Part": "data.rows.mixture",
    "SFTDataModule": "datamodule",
    "SFTModule": "module",
    "log_likelihood": "objective",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``lightning-sft --version`` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
