"""Callbacks for any Lightning trainer: checkpoints, preemption, the sample log, exports, predictions.

In: a trainer and a module in a run.
Out: files in the folder of the run.
May import: everything but demos and commands.
"""

from lightning_sft.callbacks.checkpoint import BestCheckpoint, SafeCheckpoint
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
from lightning_sft.callbacks.summary import RunSummary

__all__ = [
    "BestCheckpoint",
    "DriftMonitor",
    "HFExport",
    "KeepMemory",
    "OptimizerInBackward",
    "PredictionWriter",
    "Preempt",
    "RunRecord",
    "RunSummary",
    "SafeCheckpoint",
    "SampleGenerations",
    "SampleLedger",
    "ScoreAnswers",
    "TrainingProgress",
]
