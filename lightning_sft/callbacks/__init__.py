"""Callbacks for any Lightning trainer."""

from lightning_sft.callbacks.hf_export import HFExport
from lightning_sft.callbacks.predictions import PredictionWriter

__all__ = ["HFExport", "PredictionWriter"]
