from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate, chain, cycle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.data.batches.collate import collate
from lightning_sft.data.batches.loader import EpochLoader
from lightning_sft.data.batches.plan import EpochPlan
from lightning_sft.training import checks as guards
from lightning_sft.types import Batch, Example, InputError, LogLikelihood


def module_on_one_rank(is_finite: Callable[[Batch], bool]) -> Any:
    """A module whose likelihood is finite or not by what the batch is."""

    def likelihood(batch: Batch) -> Any:
        return SimpleNamespace(total=torch.tensor(0.0 if is_finite(batch) else torch.nan))

    likelihood.trainer, likelihood.device = None, "cpu"  # type: ignore[attr-defined]  # as of a module
    return likelihood


def test_the_samples_whose_loss_is_not_finite_are_named_once_they_are_computed_alone() -> None:
    batch = collate([Example([1, 2], [0, 1], "f:1"), Example([3, 4, 5], [0, 1, 1], "f:2")])
    both_share_a_nan = LogLikelihood(*torch.tensor([0.0, 3.0]), *torch.full((3, 3), torch.nan))
    text = str(guards.not_finite([(batch, both_share_a_nan)], module_on_one_rank(lambda own: 3 not in own.input_ids)))
    assert "f:2" in text
    assert "f:1" not in text


def test_a_row_of_several_sequences_is_named_also_where_its_last_one_is_sound() -> None:
    batch = collate([Example([3, 4, 5], [0, 1, 1], "f:1"), *(Example([1, 2], [0, 1], f"f:{n}") for n in (1, 2))])
    all_share_a_nan = LogLikelihood(*torch.tensor([0.0, 4.0]), *torch.full((3, 4), torch.nan))
    text = str(guards.not_finite([(batch, all_share_a_nan)], module_on_one_rank(lambda own: 3 not in own.input_ids)))
    assert "Samples: f:1." in text


def test_a_step_without_targets_is_said_so() -> None:
    batch = Batch.of({"input_ids": torch.tensor([[1, 2]]), "labels": torch.full((1, 2), -100)})
    empty = LogLikelihood(*torch.tensor([0.0, 0.0]), *torch.zeros(3, 0))
    assert "no token of this step is a target" in str(guards.not_finite([(batch, empty)], module_on_one_rank(bool)))


def test_where_no_sample_is_to_blame_it_says_so() -> None:
    assert "Samples: none by itself" in str(guards.not_finite([], module_on_one_rank(lambda _: True)))


class NanAtOneTarget(SFTModule):
    """A loss that is NaN at the target token of one row, though its probability is not."""

    def target_loss(self, logits: Tensor, targets: Tensor, *inputs: Tensor) -> Tensor:
        return super().target_loss(logits, targets) * torch.where(targets == POISON, torch.nan, 1.0)


class NanOfOneBatch(SFTModule):
    """A loss of a batch that is NaN where a token is in it."""

    def forward(self, batch: Batch) -> LogLikelihood:
        found = super().forward(batch)
        return replace(found, total=found.total * torch.where((batch.input_ids == POISON).any(), torch.nan, 1.0))


class NanOfSeveral(SFTModule):
    """A loss of pairs, which takes no single document."""

    def forward(self, batch: Batch) -> LogLikelihood:
        first, second = (super(NanOfSeveral, self).forward(batch.document(number)) for number in (0, 1))
        found = super().forward(batch)
        return replace(found, total=(first.total - second.total) * torch.nan)


POISON = ord("~") - 33


@pytest.mark.parametrize("kind", [NanAtOneTarget, NanOfOneBatch, NanOfSeveral])
def test_the_row_whose_own_loss_is_no_number_is_named(
    pretrained: str, quiet_trainer: Any, jsonl: Any, kind: type[SFTModule]
) -> None:
    path = jsonl([{"prompt": "fine", "completion": "ok"}, {"prompt": "bad", "completion": "~k"}])
    named = rf"{path}:1, {path}:2" if kind is NanOfSeveral else rf"{path}:2"  # it is in the pair
    with pytest.raises(FloatingPointError, match=rf"Samples: {named}\. Nothing was updated"):
        quiet_trainer().fit(kind(pretrained), SFTDataModule(train=path))


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"callbacks": [GradientAccumulationScheduler({0: 1, 2: 4})]}, "Use a constant trainer.accumulate"),
        ({"precision": "16-true"}, "Use trainer.precision=32-true"),
        ({"gradient_clip_val": -1.0}, "expected a positive number or null"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches is 0; expected at least 1"),
        ({"accumulate_grad_batches": {0: 2}}, r"accumulate_grad_batches is \{0: 2\}; expected an integer"),
        ({"accumulate_grad_batches": 1.5}, "accumulate_grad_batches is 1.5; expected an integer"),
        ({"accumulate_grad_batches": None}, "accumulate_grad_batches is None; expected an integer"),
        ({"max_epochs": 1.5}, "max_epochs is 1.5; expected an integer or null"),
        ({"max_steps": 1.5}, "max_steps is 1.5; expected an integer"),
    ],
)
def test_what_would_make_the_gradient_wrong_is_refused_before_anything_is_read(
    settings: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(InputError, match=remedy):
        Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", **settings).fit(SFTModule("nowhere"), [])


def test_float16_is_not_taken_for_bfloat16_on_a_cpu() -> None:
    with pytest.warns(UserWarning, match="Using `precision='bf16-mixed'` instead"):
        trainer = Trainer(precision="16-mixed", accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(InputError, match="Use 32-true, or bf16-mixed"):
        guards.check_precision("16-mixed", trainer)
    guards.check_precision("bf16-mixed", trainer)


def test_answers_of_a_sharded_model_are_refused() -> None:
    trainer = Trainer(strategy="fsdp2", accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)
    guards.check_trainer(trainer, "validate")
    with pytest.raises(InputError, match="Export the checkpoint"):
        guards.check_trainer(trainer, "predict")
    strategy = SimpleNamespace(restore_checkpoint_after_setup=True, zero_stage_3=True)
    with pytest.raises(InputError, match="and validate needs it whole"):
        guards.check_trainer(SimpleNamespace(strategy=strategy, precision="32-true"), "validate")


class FSDPStrategy(SingleDeviceStrategy):
    """Lightning's own cannot be made without a GPU; it is known by its name."""


def test_the_first_fsdp_is_refused() -> None:
    with pytest.raises(InputError, match=r"trainer\.strategy=fsdp2"):
        Trainer(logger=False, enable_checkpointing=False, strategy=FSDPStrategy("cpu")).fit(SFTModule("nowhere"), [])


@pytest.mark.parametrize(("limit", "refused"), [(4, False), (5, True)])
def test_an_epoch_that_ends_inside_a_step_is_refused_where_the_strategy_would_go_on_with_it(
    limit: int, refused: bool
) -> None:
    strategy = SimpleNamespace(handles_gradient_accumulation=True)
    trainer = SimpleNamespace(strategy=strategy, accumulate_grad_batches=2, num_training_batches=limit)
    trainer.train_dataloader, trainer.lr_scheduler_configs = None, []
    with pytest.raises(InputError, match="a multiple of") if refused else nullcontext():
        guards.check_epoch(trainer)


@pytest.mark.parametrize(("num_ranks", "refused"), [(2, False), (3, True)])
def test_a_rank_that_would_never_have_anything_to_do_is_refused(num_ranks: int, refused: bool) -> None:
    plan = EpochPlan([4, 4], [1.0, 1.0], lambda lengths: [[0], [1]], num_ranks=num_ranks)
    trainer = SimpleNamespace(strategy=SingleDeviceStrategy("cpu"), accumulate_grad_batches=1, num_training_batches=1)
    trainer.train_dataloader, trainer.lr_scheduler_configs = EpochLoader([], plan), []
    with pytest.raises(InputError, match="fills 2 micro-batches, so of 3 ranks") if refused else nullcontext():
        guards.check_epoch(trainer)


def test_bfloat16_on_a_cpu_that_has_none_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "bfloat16_is_slow", lambda: True)
    with pytest.warns(UserWarning, match="trainer.precision=32-true"):
        guards.warn_if_bfloat16_is_slow()


@pytest.mark.parametrize(("seconds", "slow"), [([1, 1], False), ([1, 80], True), ([1] * 4 + [9] * 4, False)])
def test_other_work_of_the_machine_does_not_look_like_slow_bfloat16(
    seconds: list[float], slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = accumulate(chain.from_iterable((0.0, each) for each in cycle(seconds)))  # between measurements, during one
    monkeypatch.setattr(guards.time, "perf_counter", lambda: next(clock))
    assert guards.bfloat16_is_slow.__wrapped__(8) is slow
