"""The check of gradients passes where they are right, and fails where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lightning_sft import SFTModule
from lightning_sft.commands.verify.gradients import check_gradients
from lightning_sft.types import Batch, InputError
from tests.helpers.verifying import LORA, subject


@pytest.mark.parametrize("model", [{}, LORA, {"normalize": "sequence"}, {"gradient_checkpointing": True}], ids=str)
def test_it_passes_where_gradients_are_right(pretrained: str, tmp_path: Path, model: Any) -> None:
    outcome = check_gradients(subject(pretrained, tmp_path, **model))
    assert outcome.passed, outcome
    packings = [(count, packing) for packing in ("packed", "padded") for count in (1, 2, 4)]
    assert [tuple(case.name.split()[:2]) for case in outcome.cases] == [(str(n), packing) for n, packing in packings]
    assert 0 < max(case.measured for case in outcome.cases) < 1e-5


def test_it_passes_in_float64_with_a_tighter_tolerance(pretrained: str, tmp_path: Path) -> None:
    outcome = check_gradients(subject(pretrained, tmp_path, samples={"precision": "64-true"}))
    assert outcome.passed
    assert {case.tolerance for case in outcome.cases} == {1e-6}


class LateTokensMore(SFTModule):
    """A loss of its own, which depends on a value of each position."""

    def loss_inputs(self, batch: Batch) -> Sequence[Tensor]:
        return [batch.position_ids]

    def target_loss(self, logits: Tensor, targets: Tensor, *inputs: Tensor) -> Tensor:
        return super().target_loss(logits, targets) * (1 + inputs[0])


class MeanOfItsOwn(SFTModule):
    """A loss that is not one of each target alone: it depends on how many are computed at a time."""

    def target_loss(self, logits: Tensor, targets: Tensor, *inputs: Tensor) -> Tensor:
        return super().target_loss(logits, targets) / len(targets)


def test_the_loss_of_a_subclass_is_that_of_the_reference(pretrained: str, tmp_path: Path) -> None:
    assert check_gradients(subject(pretrained, tmp_path, kind=LateTokensMore)).passed
    with pytest.raises(InputError, match=r"MeanOfItsOwn.target_loss of a target depends on those it is given with"):
        check_gradients(subject(pretrained, tmp_path, kind=MeanOfItsOwn))


def test_a_mean_over_micro_batches_is_found(pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The common mistake: each micro-batch divided by its own targets. One micro-batch has nothing of it."""

    def own_mean(module: SFTModule, batch: Batch, batch_idx: int) -> Any:
        total, weight = module(batch)
        return -total / weight.clamp(min=1)

    monkeypatch.setattr(SFTModule, "training_step", own_mean)
    monkeypatch.setattr(SFTModule, "on_before_optimizer_step", lambda module, optimizer: None)
    outcome = check_gradients(subject(pretrained, tmp_path))
    passed = {case.name: case.passed for case in outcome.cases}
    assert passed["1 packed micro-batch"]
    assert not passed["2 packed micro-batches"]
    assert not passed["4 padded micro-batches"]


def test_the_tensor_whose_gradient_is_wrong_is_named(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    load = SFTModule.configure_model

    def with_a_wrong_one(module: SFTModule) -> None:
        if module.model is not None:
            return
        load(module)
        assert module.model is not None
        module.model.get_parameter(name).register_hook(lambda gradient: gradient * 1.01)

    monkeypatch.setattr(SFTModule, "configure_model", with_a_wrong_one)
    for case in check_gradients(subject(pretrained, tmp_path)).cases:
        [failure] = case.failures
        assert failure.startswith(f"{name}: 0.01"), failure
