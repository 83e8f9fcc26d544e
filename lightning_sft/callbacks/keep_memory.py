"""Freed memory stays with the process: a step on a CPU is then not a series of page faults."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.io.arguments import check_arguments
from lightning_sft.machine.glibc_malloc import keep_freed_memory


class KeepMemory(Callback):
    """On a CPU, has the C library keep what a step frees for the next one; see docs/performance for what it brings.

    It sets the allocator of this process by glibc's ``mallopt``, so nothing is started anew. The command line adds it
    to ``fit``; ``enabled=False`` leaves the allocator alone, and so do ``MALLOC_*`` variables of the user's own.

    Args:
        enabled: Whether it does anything.
    """

    def __init__(self, enabled: bool = True) -> None:
        check_arguments(KeepMemory, locals())
        self.enabled = enabled

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the model is loaded."""
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if self.enabled and stage == "fit" and on_cpu and keep_freed_memory():
            rank_zero_info(
                "Freed memory is kept for the next step (callback KeepMemory; enabled: false hands it back)."
            )
