"""Steps of a user's own batches: what a subclass adds to the loss is not divided by their targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_pretrained
from lightning_sft.training.own_steps import _is_multiple
from lightning_sft.types import InputError
from tests.helpers.gradients import ROWS, furthest
from tests.helpers.own_steps import CASES, applied, batches, classes
from tests.helpers.processes import torchrun

COUNTS = [3, 9, 5, 1]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """No part of it computes in float32 when the weights are float64."""
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return tiny_pretrained(tmp_path_factory.mktemp("pretrained") / "gpt2", "gpt2", **off)


def with_auxiliary(pretrained: str, plain: list[Tensor]) -> list[Tensor]:
    """Gradients, and that of the page's auxiliary loss, once."""
    module = classes()["Penalized"](pretrained).double()
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


def test_two_ranks_apply_it_once_as_well(gpt2: str, tmp_path: Path) -> None:
    torchrun("tests.helpers.own_steps", gpt2, str(tmp_path))
    rows = batches(COUNTS)
    for (name, strategy), accumulate in CASES.items():
        size = 2 * accumulate
        windows = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
        steps = [{key: torch.cat([row[key] for row in window]) for key in rows[0]} for window in windows]
        wanted = with_auxiliary(gpt2, applied(SFTModule, gpt2, steps)[0])
        for rank in (0, 1):
            assert furthest(torch.load(tmp_path / f"{name}.{strategy}.rank{rank}"), wanted) <= 1e-10
