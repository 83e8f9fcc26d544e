"""Schedulers of torch as ``model.schedule``."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau as Monitored
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import SafeCheckpoint
from lightning_sft.types import InputError
from tests.helpers.gradients import ROWS

Make = Callable[..., Trainer]
DATA: dict[str, Any] = {"train": ROWS, "val": ROWS[:4], "tokens_per_batch": 200}


class Rates(Callback):
    """The learning rate of each optimizer step; ends the run after one of them, if asked."""

    def __init__(self, ends_after: int | None = None) -> None:
        self.rates: list[float] = []
        self.ends_after = ends_after

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.ends_after:
            raise KeyboardInterrupt
        self.rates.append(optimizer.param_groups[0]["lr"])


def module_of(pretrained: str, schedule: Any, lr: float = 0.1) -> SFTModule:
    return SFTModule(pretrained, optimizer=partial(SGD, lr=lr), schedule=schedule)


def test_a_scheduler_of_torch_is_stepped_after_each_optimizer_step(pretrained: str, quiet_trainer: Make) -> None:
    seen = Rates()
    trainer = quiet_trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=[seen])
    schedule = partial(OneCycleLR, max_lr=0.1, total_steps=20, cycle_momentum=False)
    trainer.fit(module_of(pretrained, schedule), SFTDataModule(train=ROWS, tokens_per_batch=100))
    optimizer = SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    wanted, scheduler = [], schedule(optimizer)
    for _ in range(trainer.global_step):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert len(set(wanted)) == len(wanted) > 3
    assert seen.rates == wanted


def one_cycle(optimizer: Any, steps: int = 3) -> Any:
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=steps, cycle_momentum=False)


@pytest.mark.parametrize(
    "schedule",
    [
        one_cycle,
        lambda optimizer: ChainedScheduler([ConstantLR(optimizer), one_cycle(optimizer)], optimizer),
        lambda optimizer: SequentialLR(optimizer, [ConstantLR(optimizer), one_cycle(optimizer, 2)], [1]),
    ],
    ids=["alone", "chained", "sequential"],
)
def test_a_scheduler_that_ends_before_the_fit_is_refused_before_the_first_step(
    pretrained: str, quiet_trainer: Make, schedule: Any
) -> None:
    seen = Rates()
    trainer = quiet_trainer(max_steps=4, max_epochs=-1, callbacks=[seen])
    with pytest.raises(InputError, match=r"OneCycleLR ends after total_steps=\d, but the fit has \d optimizer steps"):
        trainer.fit(module_of(pretrained, schedule), SFTDataModule(train=ROWS, tokens_per_batch=100))
    assert seen.rates == []


@pytest.mark.parametrize(("half", "rises"), [(2, True), (4, False)])
def test_a_cosine_that_rises_again_before_the_end_is_said(
    pretrained: str, quiet_trainer: Make, half: int, rises: bool
) -> None:
    trainer = quiet_trainer(max_steps=4, max_epochs=-1)
    module = module_of(pretrained, partial(CosineAnnealingLR, T_max=half))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, SFTDataModule(train=ROWS, tokens_per_batch=100))
    found = [str(one.message) for one in said if "rises again" in str(one.message)]
    assert len(found) == rises
    assert all("after T_max=2, and rises again: the fit has 4 optimizer steps" in text for text in found)


def test_a_sequence_whose_last_part_has_as_many_steps_as_are_left_is_trained(
    pretrained: str, quiet_trainer: Make
) -> None:
    trainer = quiet_trainer(max_steps=4, max_epochs=-1)
    trainer.fit(
        module_of(pretrained, lambda own: SequentialLR(own, [ConstantLR(own), one_cycle(own)], [1])),
        SFTDataModule(train=ROWS, tokens_per_batch=100),
    )
    assert trainer.global_step == 4


@pytest.mark.parametrize("settings", [{"max_lr": 0.1}, {"max_lr": 0.1, "total_steps": 0}])
def test_settings_that_a_scheduler_does_not_take_are_refused(
    pretrained: str, quiet_trainer: Make, settings: dict[str, Any]
) -> None:
    module = module_of(pretrained, partial(OneCycleLR, **settings))
    with pytest.raises(InputError, match=r"model.schedule: the scheduler does not take its optimizer or settings"):
        quiet_trainer().fit(module, SFTDataModule(train=ROWS, tokens_per_batch=400))


def test_a_warm_up_beside_a_scheduler_of_torch_has_no_effect_and_is_said(pretrained: str, quiet_trainer: Make) -> None:
    schedule = partial(OneCycleLR, max_lr=0.1, total_steps=20, cycle_momentum=False)
    module = SFTModule(pretrained, schedule=schedule, warmup=0.1)
    with pytest.warns(UserWarning, match=r"model.warmup=0.1 has no effect beside a scheduler of torch"):
        quiet_trainer().fit(module, SFTDataModule(train=ROWS, tokens_per_batch=400))


# with a threshold that nothing reaches, each validation but the first is one of no progress
STUCK: dict[str, Any] = {"patience": 0, "factor": 0.5, "threshold": 0.9}


@pytest.mark.parametrize(
    "kind", [partial(ReduceLROnPlateau, **STUCK), partial(Monitored, monitor="val/entropy", **STUCK)]
)
@pytest.mark.parametrize(
    ("settings", "between"),
    [
        ({"val_check_interval": 2}, 2),
        ({}, 4),
        ({"check_val_every_n_epoch": 2}, 8),
        ({"check_val_every_n_epoch": None, "val_check_interval": 6}, 6),
    ],
)
def test_a_plateau_is_looked_for_after_each_validation(
    pretrained: str, quiet_trainer: Make, kind: Any, settings: dict[str, Any], between: int
) -> None:
    seen = Rates()
    trainer = quiet_trainer(max_epochs=5, callbacks=[seen], **settings)
    trainer.fit(module_of(pretrained, kind), SFTDataModule(**DATA))
    assert trainer.global_step == 20
    assert seen.rates == [0.1 * 0.5 ** max(0, step // between - 1) for step in range(20)]


class Slow(Callback):
    """Lets a micro-batch take some seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *args: Any) -> None:
        time.sleep(self.seconds)


class Validations(Callback):
    """The step of each validation."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.steps += [] if trainer.sanity_checking else [trainer.global_step]


@pytest.mark.parametrize(
    ("settings", "data"),
    [
        ({}, {"streaming": True, "num_workers": 0}),
        ({"val_check_interval": 3, "accumulate_grad_batches": 2}, {}),
        ({"val_check_interval": "00:00:00:01", "callbacks": [Slow(0.2)]}, {}),
    ],
    ids=["a stream", "within a step", "by time"],
)
def test_a_plateau_is_looked_for_whenever_a_validation_comes(
    pretrained: str, quiet_trainer: Make, settings: dict[str, Any], data: dict[str, Any]
) -> None:
    seen, validations = Rates(), Validations()
    callbacks = [seen, validations, *settings.pop("callbacks", [])]
    trainer = quiet_trainer(**{"max_epochs": 4, "callbacks": callbacks} | settings)
    trainer.fit(module_of(pretrained, partial(ReduceLROnPlateau, **STUCK)), SFTDataModule(**DATA | data))
    before = [sum(at <= step for at in validations.steps) for step in range(trainer.global_step)]
    assert max(before) > 1
    assert seen.rates == [0.1 * 0.5 ** max(0, number - 1) for number in before]


def test_a_plateau_needs_validation_data_and_a_metric_that_is_logged(pretrained: str, quiet_trainer: Make) -> None:
    with pytest.raises(InputError, match=r"ReduceLROnPlateau is stepped after each validation: set data\.val"):
        quiet_trainer().fit(module_of(pretrained, ReduceLROnPlateau), SFTDataModule(**DATA | {"val": None}))
    module = module_of(pretrained, partial(Monitored, monitor="val/loss/nowhere"))  # only a validation knows its parts
    with pytest.raises(InputError, match=r"the metric 'val/loss/nowhere' was not logged\. Logged are .*val/loss"):
        quiet_trainer(max_epochs=1).fit(module, SFTDataModule(**DATA))


@pytest.mark.parametrize("ends_after", [2, 3, 4])
def test_a_run_with_a_plateau_resumes_bit_for_bit(
    pretrained: str, quiet_trainer: Make, tmp_path: Path, ends_after: int
) -> None:
    def fit(folder: str, seen: Rates, **settings: Any) -> Any:
        saver = SafeCheckpoint(tmp_path / folder, every_n_train_steps=1)
        trainer = quiet_trainer(max_epochs=2, val_check_interval=2, callbacks=[seen, saver], enable_checkpointing=True)
        module = module_of(pretrained, partial(ReduceLROnPlateau, **STUCK))
        trainer.fit(module, SFTDataModule(**DATA), **settings)
        return module

    whole, first, rest = Rates(), Rates(ends_after), Rates()
    wanted = fit("whole", whole)
    with pytest.raises(SystemExit):
        fit("parts", first)
    got = fit("parts", rest, ckpt_path="last")
    assert len(set(whole.rates)) == 3
    assert first.rates + rest.rates == whole.rates
    assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), got.parameters(), strict=True))


def test_a_checkpoint_holds_no_scheduler_of_a_user(pretrained: str, quiet_trainer: Make, tmp_path: Path) -> None:
    trainer = quiet_trainer()
    trainer.fit(module_of(pretrained, lambda optimizer: ReduceLROnPlateau(optimizer)), SFTDataModule(**DATA))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = SFTModule.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert again.schedule == "cosine"
