"""Callbacks for any Lightning trainer."""

from lightning_sft.callbacks.checkpoint import SafeCheckpoint
from lightning_sft.callbacks.drift import DriftMonitor
from lightning_sft.callbacks.hf_export import HFExport
from lightning_sft.callbacks.keep_memory import KeepMemory
from lightning_sft.callbacks.ledger import SampleLedger
from lightning_sft.callbacks.optimizer_in_backward import OptimizerInBackward
from lightning_sft.callbacks.predictions import PredictionWriter
from lightning_sft.callbacks.preempt import Preempt
from lightning_sft.callbacks.progress import TrainingProgress
from lightning_sft.callbacks.record import RunRecord
from lightning_sft.callbacks.samples import SampleGenerations
from lightning_sft.callbacks.scores import ScoreAnswers

__all__ = [
    "DriftMonitor",
    "HFExport",
    "KeepMemory",
    "OptimizerInBackward",
    "PredictionWriter",
    "Preempt",
    "RunRecord",
    "SafeCheckpoint",
    "SampleGenerations",
    "SampleLedger",
    "ScoreAnswers",
    "TrainingProgress",
]
