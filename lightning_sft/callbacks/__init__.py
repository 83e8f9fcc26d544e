"""Callbacks for any Lightning trainer."""

from lightning_sft.callbacks.predictions import PredictionWriter

__all__ = ["PredictionWriter"]
