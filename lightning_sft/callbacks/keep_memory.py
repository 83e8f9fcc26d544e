"""Freed heap memory stays with the process, which avoids page faults in every step on a CPU."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_sft.io.arguments import check_arguments
from lightning_sft.io.named import OurNames
from lightning_sft.machine.allocators import keep_freed_memory
from lightning_sft.training.trainer import announce


class KeepMemory(Callback, OurNames):
    """On CPUs, makes glibc retain freed memory for the next step; docs/howto/performance.md has measurements.

    It configures the allocator of this process with ``mallopt``, so no restart is needed. The command line adds it to
    ``fit``. ``enabled=False`` leaves the allocator alone, and so do ``MALLOC_*`` environment variables.

    Args:
        enabled: Whether to retain freed memory.
    """

    def __init__(self, enabled: bool = True) -> None:
        check_arguments(KeepMemory, locals())
        self.enabled, self.keeps = enabled, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Configure the allocator before the model is loaded."""
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if self.enabled and stage == "fit" and on_cpu and keep_freed_memory():
            self.keeps = True
            announce(
                trainer,
                "Freed memory is retained for the next step (callback KeepMemory; enabled: false turns this off).",
            )
