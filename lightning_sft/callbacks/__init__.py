"""Callbacks for any Lightning trainer."""

from lightning_sft.callbacks.checkpoint import SafeCheckpoint
from lightning_sft.callbacks.hf_export import HFExport
from lightning_sft.callbacks.ledger import SampleLedger
from lightning_sft.callbacks.predictions import PredictionWriter
from lightning_sft.callbacks.preempt import Preempt

__all__ = ["HFExport", "PredictionWriter", "Preempt", "SafeCheckpoint", "SampleLedger"]
