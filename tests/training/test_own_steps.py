"""Steps of a user's own batches: what a subclass adds to the loss is not divided by their targets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_pretrained
from lightning_sft.training.own_steps import _is_multiple
from lightning_sft.types import InputError
from tests.helpers.gradients import ROWS, furthest
from tests.helpers.own_steps import CASES, LACKING, applied, batches, classes
from tests.helpers.processes import torchrun

COUNTS = [3, 9, 5, 1]
UNTRAINED = r"No token is a target in the first {} of this fit, .*all labels of your batches are -100"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """No part of it computes in float32 when the weights are float64."""
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return tiny_pretrained(tmp_path_factory.mktemp("pretrained") / "gpt2", "gpt2", **off)


def with_auxiliary(pretrained: str, plain: list[Tensor]) -> list[Tensor]:
    """Gradients, and that of the page's auxiliary loss, once."""
    module = classes()["Penalized"](pretrained)
    module.configure_model()
    module.double().auxiliary_loss().backward()
    in_order = sorted(module.parameters(), key=lambda p: p.ndim <= 1)  # of the module's parameter groups
    alone = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in in_order])
    assert alone.abs().max() > 1e-6
    return [gradient + alone for gradient in plain]


@pytest.mark.parametrize(
    ("name", "own", "accumulate"),
    [
        *[("Penalized", own, accumulate) for own in (True, False) for accumulate in (1, 2, 4)],
        *[("Added", False, accumulate) for accumulate in (1, 2, 4)],
        ("Added", True, 1),  # more are refused
    ],
)
def test_an_auxiliary_loss_counts_once_however_a_step_is_split(
    gpt2: str, name: str, own: bool, accumulate: int
) -> None:
    data = [batches(COUNTS) if own else SFTDataModule(train=ROWS, tokens_per_batch=100) for _ in range(2)]
    plain, trainer = applied(SFTModule, gpt2, data[0], accumulate_grad_batches=accumulate)
    found, other = applied(classes()[name], gpt2, data[1], accumulate_grad_batches=accumulate)
    assert furthest(found, with_auxiliary(gpt2, plain)) <= 1e-10
    losses = [one.callback_metrics["train/loss"].item() for one in (trainer, other)]
    assert (losses[0] == losses[1]) == (name == "Added")  # as the page says


def test_an_auxiliary_loss_that_would_be_divided_by_the_targets_is_refused(gpt2: str) -> None:
    with pytest.raises(InputError, match=r"^Added.training_step changes .*\.replace\(likelihood, total=.*=1\.$"):
        applied(classes()["Added"], gpt2, batches(COUNTS), accumulate_grad_batches=2)


@pytest.mark.parametrize("kind", ["factor", "mapping", "constant"])
def test_a_factor_of_the_loss_is_no_auxiliary_loss(gpt2: str, kind: str) -> None:
    class Scaled(SFTModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return {"factor": 0.5 * loss.clone(), "mapping": {"loss": loss / 2}, "constant": -(1 - loss) * 0.5}[kind]

    plain, _ = applied(SFTModule, gpt2, batches(COUNTS), accumulate_grad_batches=2)
    found, _ = applied(Scaled, gpt2, batches(COUNTS), accumulate_grad_batches=2)
    assert furthest(found, [0.5 * gradient for gradient in plain]) <= 1e-10


def test_of_the_outputs_of_ddp_the_loss_is_followed_and_functions_that_are_not_linear_are_seen() -> None:
    class Sink(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
            return tensors

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
            return gradients

    named = type("_DDPSink", (Sink,), {})
    weight = torch.ones((), requires_grad=True)
    loss, other = weight * 2, weight * 3
    passed: Any = named.apply(other, torch.ones(()), loss)
    assert _is_multiple(passed[2] / 4, loss)
    assert _is_multiple((loss * torch.tensor(65_536.0)).double(), loss)  # as a scaler does
    for wrong in (passed[0], passed[2] + passed[0], loss + weight, loss * loss, loss.exp(), other, loss.detach()):
        assert not _is_multiple(wrong, loss)


@pytest.fixture(scope="module")
def of_two_ranks(gpt2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    torchrun("tests.helpers.own_steps", gpt2, str(folder))
    return folder


def joined(counts: list[int], size: int) -> list[dict[str, Tensor]]:
    """Batches of one process that are the steps of several."""
    rows = batches(counts)
    windows = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
    return [{key: torch.cat([row[key] for row in window]) for key in rows[0]} for window in windows]


def test_two_ranks_apply_it_once_as_well(gpt2: str, of_two_ranks: Path) -> None:
    for (name, strategy), accumulate in CASES.items():
        wanted = with_auxiliary(gpt2, applied(SFTModule, gpt2, joined(COUNTS, 2 * accumulate))[0])
        for rank in (0, 1):
            assert furthest(torch.load(of_two_ranks / f"{name}.{strategy}.rank{rank}"), wanted) <= 1e-10


def test_a_rank_without_targets_is_fine_and_two_without_are_refused(gpt2: str, of_two_ranks: Path) -> None:
    wanted, _ = applied(SFTModule, gpt2, joined(LACKING["one"], 2))
    for rank in (0, 1):
        assert furthest(torch.load(of_two_ranks / f"one.rank{rank}"), wanted) <= 1e-10
        assert re.match(UNTRAINED.format("2 steps"), torch.load(of_two_ranks / f"both.rank{rank}"))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, {1: "4 steps", 3: "2 steps"}),
        ({"limit_train_batches": 3}, {1: "3 steps", 3: "1 step"}),
        ({"max_steps": 2}, {1: "2 steps", 3: "2 steps"}),
        ({"every": 1}, {1: "1 step", 3: "1 step"}),
    ],
    ids=["at the end of the epoch", "at its limit", "at the last step", "at the first checkpoint"],
)
def test_a_fit_without_a_target_is_refused_before_anything_is_saved(
    gpt2: str, tmp_path: Path, accumulate: int, settings: dict[str, Any], steps: dict[int, str]
) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=settings.get("every"))
    own = {"callbacks": [saver], "enable_checkpointing": True, "accumulate_grad_batches": accumulate, **settings}
    own.pop("every", None)
    with pytest.raises(InputError, match=UNTRAINED.format(steps[accumulate])):
        applied(SFTModule, gpt2, batches([0] * 4), **own)
    assert not list(tmp_path.iterdir())


def test_steps_without_targets_before_one_with_some_are_fine(gpt2: str, tmp_path: Path) -> None:
    """A kill in the first of them saves what there is: an error hides no other."""

    class Killed(SFTModule):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("killed")

    gradients, trainer = applied(SFTModule, gpt2, batches([0, 0, 3]))
    assert [bool(gradient.any()) for gradient in gradients] == [False, False, True]
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saver = ModelCheckpoint(tmp_path, save_on_exception=True)
    with pytest.raises(RuntimeError, match="killed"):
        applied(Killed, gpt2, batches([0, 0, 3]), callbacks=[saver], enable_checkpointing=True)
    assert len(list(tmp_path.iterdir())) == 2
