"""What a run keeps of itself in a checkpoint: where it is, its seed, and what was asked of its optimizer."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, StepLR

from lightning_sft import SFTDataModule
from lightning_sft.checkpoints.resume import (
    OPTIMIZER_KEY,
    POSITION_KEY,
    SHARDED_KEY,
    AskedSettings,
    RunPosition,
    RunState,
    plan_of,
    restore,
    retune,
    seed_of,
)
from lightning_sft.types import InputError


@pytest.fixture(autouse=True)
def _no_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """That an earlier test of the process has set for all."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


def trainer_at(
    epochs: tuple[int, int, int] = (1, 1, 0),
    fetched: int = 0,
    steps: int = 0,
    of: int = 5,
    validated: int | None = None,
) -> Trainer:
    """A trainer with these counters; two micro-batches are a step.

    Args:
        epochs: Numbers of epochs that are ready, started and processed.
        fetched: Number of micro-batches of the epoch that have been fetched.
        steps: Number of its optimizer steps.
        of: Number of its micro-batches.
        validated: Number of micro-batches of three of the validation that is running, if one is.
    """
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", accumulate_grad_batches=2, **settings)
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    current: Any = fit.epoch_progress.current
    current.ready, current.started, current.processed = epochs
    fit.max_batches = of
    loop.batch_progress.current.ready = fetched
    loop.automatic_optimization.optim_progress.optimizer.step.current.completed = steps
    loop.val_loop._max_batches = [2, 1]
    loop.val_loop.batch_progress.current.completed = 3 if validated is None else validated
    trainer.state.stage = RunningStage.TRAINING if validated is None else RunningStage.VALIDATING
    return trainer


@pytest.mark.parametrize(
    ("counters", "epoch", "steps", "micro_batches", "is_last", "is_validated"),
    [
        ({"epochs": (0, 0, 0)}, 0, 0, 0, False, False),
        ({}, 0, 0, 0, False, False),
        ({"epochs": (2, 1, 1), "fetched": 5, "steps": 3}, 1, 0, 0, False, True),  # counters are still the last epoch's
        ({"fetched": 1}, 0, 0, 0, False, True),
        ({"fetched": 3, "steps": 1}, 0, 1, 2, False, True),
        ({"fetched": 2, "steps": 1}, 0, 1, 2, False, False),
        ({"fetched": 2, "steps": 1, "validated": 2}, 0, 1, 2, False, False),
        ({"fetched": 2, "steps": 1, "validated": 3}, 0, 1, 2, False, True),
        ({"fetched": 5, "steps": 3}, 0, 3, 5, True, False),  # the last step is a short one
        ({"fetched": 5, "steps": 2}, 0, 2, 4, False, True),
        ({"fetched": 1, "steps": 1, "of": 1}, 0, 1, 1, True, False),
        ({"epochs": (1, 1, 1), "fetched": 5, "steps": 3}, 1, 0, 0, False, True),
        ({"epochs": (1, 1, 1), "fetched": 2, "steps": 1}, 0, 1, 2, False, True),  # max_steps has cut the epoch
        ({"epochs": (2, 2, 1)}, 1, 0, 0, False, False),
        ({"epochs": (2, 2, 1), "fetched": 2, "steps": 1}, 1, 1, 2, False, False),
        ({"epochs": (2, 2, 1), "fetched": 5, "steps": 3}, 1, 3, 5, True, False),
        ({"epochs": (2, 2, 2), "fetched": 5, "steps": 3}, 2, 0, 0, False, True),
    ],
)
def test_a_position_is_that_of_the_last_whole_step(
    counters: dict[str, Any], epoch: int, steps: int, micro_batches: int, is_last: bool, is_validated: bool
) -> None:
    found = RunPosition.of(trainer_at(**counters), 7)
    assert found == RunPosition(epoch, steps, micro_batches, is_last, is_validated, 1, 2, 7, None)


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]


def asked(optimizer: Optimizer) -> dict[str, Any]:
    """A checkpoint with the settings of an optimizer."""
    return {"callbacks": {}, OPTIMIZER_KEY: asdict(AskedSettings.of(optimizer))}


def test_a_checkpoint_has_the_seed_of_its_run_and_what_was_asked_of_the_optimizer() -> None:
    state, saved = RunState(), dict[str, Any]()
    state.save(trainer_at(), saved)
    assert saved.keys() == {POSITION_KEY}
    assert saved[POSITION_KEY]["seed"] == 0
    state.seed = 5
    state.made(SGD(parameters(), lr=0.5))
    state.save(trainer_at(), saved)
    assert saved[POSITION_KEY]["seed"] == 5
    assert (saved[OPTIMIZER_KEY]["classes"], saved[OPTIMIZER_KEY]["sizes"]) == (["SGD"], [2])
    [group] = saved[OPTIMIZER_KEY]["groups"]
    assert group["lr"] == 0.5
    assert "params" not in group


def test_the_first_micro_batch_decides_the_seed_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, state = trainer_at(), RunState()
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    state.seed_micro_batch(trainer, 0)
    first = torch.initial_seed()
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    state.seed_micro_batch(trainer, 0)
    assert torch.initial_seed() == first
    assert state.seed == 3
    RunState().seed_micro_batch(trainer, 0)
    assert torch.initial_seed() != first


def test_changed_settings_are_named_once_each() -> None:
    state, trainer = RunState(), trainer_at()

    def optimizer(lr: Any, decay: float) -> Optimizer:
        return AdamW([{"params": [p], "weight_decay": n * decay} for n, p in enumerate(parameters())], lr=lr)

    state.load(trainer, asked(optimizer(torch.tensor(0.5), 0.1)))
    assert state.changes() == []
    state.made(optimizer(0.5, 0.2))
    assert state.changes() == ["weight_decay=0.2"]
    state.made(optimizer(0.25, 0.2))
    assert state.changes() == ["lr=0.25", "weight_decay=0.2"]
    state.load(trainer, {"callbacks": {}})
    assert state.changes() == []


def test_the_state_of_another_optimizer_is_refused_whether_it_is_loaded_before_or_after_that_is_made() -> None:
    saved = asked(SGD(parameters(), lr=0.5))
    others: dict[str, Optimizer] = {"SGD, but": AdamW(parameters(), lr=0.5)}
    others[r"states of \[2\] parameters by group, now they are \[1\]"] = SGD(parameters()[:1], lr=0.5)
    for message, optimizer in others.items():
        before, after = RunState(), RunState()
        before.load(trainer_at(), saved)
        with pytest.raises(InputError, match=message):
            before.made(optimizer)
        after.made(optimizer)
        with pytest.raises(InputError, match=message):
            after.load(trainer_at(), saved)


def test_a_checkpoint_of_weights_or_shards_is_refused_and_one_without_a_position_left_as_it_is() -> None:
    full: dict[str, Any] = {"callbacks": {}, "loops": {"fit_loop": {}}}
    before = deepcopy(full)
    assert restore(trainer_at(), full) is None
    assert full == before
    with pytest.raises(InputError, match="has only the weights"):
        restore(trainer_at(), {"loops": {}})
    with pytest.raises(InputError, match="was written by a strategy that shards the model"):
        restore(trainer_at(), full | {SHARDED_KEY: True})


def with_data(data: Any) -> Any:
    trainer: Any = trainer_at()
    trainer.datamodule = data
    return trainer


def test_a_seed_is_that_of_everything_or_else_of_the_data_or_else_0(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seed_of(trainer_at()) == 0
    assert seed_of(with_data(SimpleNamespace(seed=4))) == 4
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert os.environ["PL_GLOBAL_SEED"] == str(seed_of(with_data(SimpleNamespace(seed=4))))


def test_streams_and_data_of_ones_own_have_no_plan() -> None:
    plan = SimpleNamespace(plan=SimpleNamespace(fingerprint="abc"))
    ours = {"planned": lambda split: {"train": plan}[split], "streaming": False, "splits": ["train"]}
    assert plan_of(with_data(SimpleNamespace(**ours))) == "abc"
    assert plan_of(with_data(SimpleNamespace(**ours | {"streaming": True}))) is None
    assert plan_of(with_data(SimpleNamespace(**ours | {"splits": ["val"]}))) is None
    assert plan_of(with_data(SimpleNamespace())) is None
    assert plan_of(trainer_at()) is None
    assert plan_of(with_data(SFTDataModule())) is None


def resumed(*optimizers: Optimizer, schedule: Any = None) -> Any:
    """A trainer whose optimizers have been restored."""
    configs = [] if schedule is None else [SimpleNamespace(scheduler=schedule)]
    return SimpleNamespace(optimizers=list(optimizers), lr_scheduler_configs=configs)


@pytest.mark.parametrize("is_known", [True, False], ids=["known", "of an older version"])
def test_settings_asked_for_win_over_restored_ones_and_the_schedule_starts_from_them(is_known: bool) -> None:
    optimizer = SGD([{"params": [p], "lr": 0.5 / n} for n, p in enumerate(parameters(), 1)], weight_decay=0.1)
    before = AskedSettings.of(optimizer)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    schedule.step()
    for group in optimizer.param_groups:
        group["momentum"] = 0.7  # a state that it keeps there
    again = [{"params": [p], "lr": 0.8 / n, "dampening": 0.3} for n, p in enumerate(parameters(), 1)]
    now = AskedSettings.of(SGD(again, weight_decay=0.2))
    retune(resumed(optimizer, schedule=schedule), now, before if is_known else None, schedule)
    for number, group in enumerate(optimizer.param_groups, 1):
        assert group["initial_lr"] == 0.8 / number
        assert group["lr"] == 0.8 / number / 2
        assert group["weight_decay"] == (0.2 if is_known else 0.1)
        assert group["dampening"] == (0.3 if is_known else 0.0)
        assert group["momentum"] == 0.7
    assert schedule.base_lrs == [0.8, 0.4]
    assert schedule.get_last_lr() == [0.4, 0.2]


def test_another_schedule_keeps_its_learning_rate_and_that_is_said_where_another_is_asked_for() -> None:
    optimizer = SGD(parameters(), lr=0.5, weight_decay=0.1)
    before, other = AskedSettings.of(optimizer), StepLR(optimizer, 1)
    own = LambdaLR(SGD(parameters(), lr=0.5), lambda step: 0.0)
    trainer = resumed(optimizer, schedule=other)
    retune(trainer, AskedSettings.of(SGD(parameters(), lr=0.5, weight_decay=0.2)), before, own)  # and warns of nothing
    [group] = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["initial_lr"]) == (0.5, 0.2, 0.5)
    with pytest.warns(UserWarning, match=r"lr=0.25 has no effect: the schedule of the checkpoint uses lr=0.5"):
        retune(trainer, AskedSettings.of(SGD(parameters(), lr=0.25)), before, None)
    assert (group["lr"], group["weight_decay"]) == (0.5, 0)


def test_an_optimizer_that_a_subclass_has_made_is_left_alone() -> None:
    own = SGD(parameters(), lr=0.5)
    groups = [{"params": [p]} for p in parameters()]
    retune(resumed(own), AskedSettings.of(SGD(groups, lr=0.1)), None, None)
    retune(resumed(own), AskedSettings.of(SGD(groups, lr=0.1, momentum=0.9)), AskedSettings.of(own), None)
    assert own.param_groups[0]["momentum"] == 0


def test_a_run_without_an_optimizer_of_ours_begins_too() -> None:
    state = RunState()
    state.begin(resumed(SGD(parameters(), lr=0.5)))
    optimizer = SGD(parameters(), lr=0.5)
    state.load(trainer_at(), asked(optimizer))
    state.made(optimizer)
    schedule = LambdaLR(optimizer, lambda step: 0.5)
    state.scheduled(schedule)
    state.begin(resumed(optimizer, schedule=schedule))
    assert optimizer.param_groups[0]["lr"] == 0.25
    deepcopy(state)
