"""Settings, callbacks and loggers of Lightning's Trainer."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor

from lightning_sft import SFTDataModule, SFTModule
from tests.helpers.gradients import ROWS, Recorder, Run, encoded, furthest, row_gradients, step_gradients

Make = Callable[..., Trainer]
DATA: dict[str, Any] = {"train": ROWS, "val": ROWS[:4], "tokens_per_batch": 100}
STEPS = 4  # of two micro-batches in an epoch of ROWS
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {  # with the number of steps that there should be
    "none": (STEPS, {}),
    "fast_dev_run": (1, {"fast_dev_run": True}),
    "fast_dev_run, 3": (2, {"fast_dev_run": 3}),
    "overfit_batches, int": (2, {"overfit_batches": 3}),
    "overfit_batches, float": (2, {"overfit_batches": 0.5}),
    "limit_train_batches, int": (3, {"limit_train_batches": 5}),
    "limit_train_batches, float": (2, {"limit_train_batches": 0.4}),
    "limit_val_batches": (STEPS, {"limit_val_batches": 1}),
    "val_check_interval, int": (STEPS, {"val_check_interval": 3}),
    "val_check_interval, float": (STEPS, {"val_check_interval": 0.3}),
    "across epochs": (2 * STEPS, {"val_check_interval": 5, "check_val_every_n_epoch": None, "max_epochs": 2}),
    "num_sanity_val_steps": (STEPS, {"num_sanity_val_steps": -1}),
    "inference_mode": (STEPS, {"inference_mode": False}),
    "reload_dataloaders": (2 * STEPS, {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}),
    "profiler, simple": (STEPS, {"profiler": "simple"}),
    "profiler, advanced": (STEPS, {"profiler": "advanced"}),
    "deterministic": (STEPS, {"deterministic": True}),
    "detect_anomaly": (STEPS, {"detect_anomaly": True}),
    "max_steps": (3, {"max_steps": 3, "max_epochs": -1}),
    "use_distributed_sampler": (STEPS, {"use_distributed_sampler": False}),
}


@cache
def alone(pretrained: str) -> dict[str, tuple[Tensor, float]]:
    return row_gradients(pretrained, encoded(pretrained), torch.float32)


@pytest.fixture
def deterministic() -> Any:
    yield
    torch.use_deterministic_algorithms(False)  # the trainer leaves it on


# detect_anomaly says that it is slow; the CPU has no pinned memory to time
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_of_the_trainer_changes_what_a_step_is(pretrained: str, quiet_trainer: Make, name: str) -> None:
    num_steps, settings = SETTINGS[name]
    run = Run()
    trainer = quiet_trainer(accumulate_grad_batches=2, callbacks=[run], **settings)
    trainer.fit(SFTModule(pretrained, optimizer=Recorder, schedule="constant"), SFTDataModule(**DATA))
    gradients = trainer.optimizers[0].gradients
    assert len(gradients) == num_steps
    per_epoch = len(run.consumed) // (2 if settings.get("max_epochs") == 2 else 1)
    epochs = [run.consumed[i : i + per_epoch] for i in range(0, len(run.consumed), per_epoch)]
    wanted = [step for epoch in epochs for step in step_gradients(alone(pretrained), [epoch], 2)]
    assert furthest(gradients, wanted) <= 1e-5


class Memory(Logger):
    """A logger of a user's own."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= metrics


FIGURES = {
    *(f"train/{name}" for name in ("loss", "token_accuracy", "entropy", "gradient_norm", "packing_efficiency")),
    *(
        "train/peak_memory_gib",
        "train/tokens_per_second",
        "train/targets_per_second",
        "train/tokens_seen",
        "train/targets_seen",
        "lr",
    ),
    *("val/loss", "val/perplexity", "val/bits_per_byte", "val/token_accuracy", "val/entropy", "val/loss_position/1"),
    *("lr-SGD/decay", "lr-SGD/no_decay", "DeviceStatsMonitor.on_train_batch_start/cpu_percent"),
}


def test_every_logger_gets_every_figure_beside_callbacks_of_lightning(
    pretrained: str, quiet_trainer: Make, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [Memory(), CSVLogger(tmp_path, name="csv", version=0), TensorBoardLogger(tmp_path, name="tb", version=0)]
    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss")
    callbacks = [EarlyStopping("val/loss"), LearningRateMonitor(), DeviceStatsMonitor(cpu_stats=True), best]
    settings = {"logger": loggers, "log_every_n_steps": 1, "max_epochs": 9, "enable_checkpointing": True}
    trainer = quiet_trainer(callbacks=callbacks, **settings)
    trainer.fit(SFTModule(pretrained, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0)), SFTDataModule(**DATA))
    assert trainer.current_epoch == 4  # the loss is what it was for EarlyStopping's three epochs
    assert best.best_model_score == trainer.callback_metrics["val/loss"]
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as file:
        in_csv = {name for row in csv.DictReader(file) for name, value in row.items() if value}
    events = EventAccumulator(str(tmp_path / "tb" / "version_0"))
    events.Reload()
    for name, found in {
        "own": set(loggers[0].metrics),
        "csv": in_csv,
        "tensorboard": set(events.Tags()["scalars"]),
    }.items():
        assert found >= FIGURES, (name, FIGURES - found)
