"""A summary of a fit before its first step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Adam

from lightning_sft.callbacks.keep_memory import KeepMemory
from lightning_sft.io.disk import short_path
from lightning_sft.io.named import OurNames
from lightning_sft.io.words import memory
from lightning_sft.machine.terminal import Console
from lightning_sft.module import SFTModule
from lightning_sft.training.flops import num_weights
from lightning_sft.training.optimizers import described
from lightning_sft.training.trainer import callbacks_of, datamodule_of, total_steps
from lightning_sft.types import InputError


class RunSummary(ModelSummary, OurNames):
    """Prints what is trained, how and where: model, dtypes, attention, kernels, optimizer, steps, memory and folders.

    The command line adds it to ``fit`` in place of Lightning's table of layers; ``trainer.enable_model_summary=false``
    leaves both out.
    """

    shows_facts = True  # in place of the lines that module and data module log

    def __init__(self) -> None:
        super().__init__()
        self._is_shown = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without the table of layers."""
        self._is_shown = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary before the first epoch, when the kernels have been chosen."""
        self._show(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Print it where a run resumes within an epoch, whose start Lightning does not repeat."""
        self._show(trainer, pl_module)

    def _show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_shown:
            return
        self._is_shown = True
        rows = list(summary(trainer, pl_module))
        if not trainer.is_global_zero:
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for name, text in rows:
            table.add_row(name, Text(text))
        console = Console()
        console.print("", table, "", sep="\n")


def summary(trainer: Trainer, module: LightningModule) -> Iterator[tuple[str, str]]:
    """What a fit is about to do, as names and texts; every rank must call this.

    Args:
        trainer: Trainer of a fit that has begun.
        module: The module, which may be a user's own.
    """
    parameters = dict(module.named_parameters())
    total = sum(map(num_weights, parameters.values()))
    trained = sum(num_weights(parameter) for parameter in parameters.values() if parameter.requires_grad)
    name = type(module).__name__
    if isinstance(module, SFTModule):
        name = f"{Path(module.pretrained).name}, {type(module.model).__name__}"
    yield "Model", f"{name}, {_count(total)} parameters"
    yield "Trained", "all" if trained == total else f"{_count(trained)} parameters ({trained / max(total, 1):.2%})"
    yield "Precision", f"{trainer.precision}; {_dtypes(parameters.values())}"
    devices, device = trainer.world_size, trainer.strategy.root_device.type
    yield "Devices", f"{devices} × {device}" + (f", {type(trainer.strategy).__name__}" if devices > 1 else "")
    if isinstance(module, SFTModule):
        yield "Attention", str(module.attention)
        yield "Kernels", f"{module.kernels.name}: {module.kernels.why}"
    schedules = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
    if isinstance(module, SFTModule) and isinstance(module.schedule, str):
        schedules = [f"{module.schedule} schedule, warm-up {module.warmup:.0%}"]
    yield "Optimizer", "; ".join([*map(described, trainer.optimizers), *schedules])
    yield "Steps", _steps(trainer)
    yield "Memory", _memory(trainer, parameters.values())
    yield from _folders(trainer)


def _count(number: int) -> str:
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"


def _dtypes(parameters: Iterable[nn.Parameter]) -> str:
    """Where parameters are stored, the trained ones first."""
    found: dict[str, Counter[str]] = {"trained": Counter(), "frozen": Counter()}
    for parameter in parameters:
        dtype = str(parameter.dtype).removeprefix("torch.")
        found["trained" if parameter.requires_grad else "frozen"][dtype] += num_weights(parameter)
    said = [f"{kind} weights in {' and '.join(name for name, _ in c.most_common())}" for kind, c in found.items() if c]
    return ", ".join(said)


def _steps(trainer: Trainer) -> str:
    try:
        steps = f"{total_steps(trainer):,}"
    except InputError:
        return "until the data or the run ends"
    if (done := trainer.global_step) > 0:
        steps += f", of which {done:,} are done"
    per_epoch = getattr(datamodule_of(trainer), "steps_per_epoch", math.inf)
    return steps if per_epoch == math.inf else f"{steps}; an epoch has {per_epoch:,}"


def _memory(trainer: Trainer, parameters: Iterable[nn.Parameter]) -> str:
    """Bytes on each device that do not depend on the data."""
    bytes_of = {parameter: _local(parameter).nbytes for parameter in parameters}
    parts = {
        "weights": sum(bytes_of.values()),
        "gradients": sum(size for parameter, size in bytes_of.items() if parameter.requires_grad),
    }
    if trainer.optimizers and all(isinstance(optimizer, Adam) for optimizer in trainer.optimizers):
        parts["optimizer"] = 2 * parts["gradients"]
    said = " + ".join(f"{memory(size)} {name}" for name, size in parts.items()) + " on each device"
    if any(isinstance(callback, KeepMemory) and callback.keeps for callback in callbacks_of(trainer)):
        said += ", freed memory is kept for the next step (KeepMemory)"
    return f"{said}; lightning-sft plan predicts the peak"


def _local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)


def _folders(trainer: Trainer) -> Iterator[tuple[str, str]]:
    savers = [saver for saver in callbacks_of(trainer) if isinstance(saver, ModelCheckpoint)]
    for folder in dict.fromkeys(str(saver.dirpath) for saver in savers if saver.dirpath):
        yield "Checkpoints", short_path(folder)
    if trainer.loggers and trainer.log_dir:
        yield "Logs", short_path(trainer.log_dir)
