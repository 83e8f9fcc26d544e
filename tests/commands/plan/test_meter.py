"""Bytes that are counted without tensors."""

from __future__ import annotations

import torch
from torch import nn

from lightning_sft.commands.plan.meter import Meter


def test_kinds_are_told_apart_from_one_step_to_the_next() -> None:
    meter = Meter()
    layer = meter.made("weights", lambda: nn.Linear(100, 50, bias=False))
    meter.follow_gradients(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    with meter:
        layer(torch.ones(2, 100)).sum().backward()
        assert meter.live["gradients"] == meter.live["weights"] == 4 * 5000
        optimizer.step()
        meter.call([optimizer.state[layer.weight][name] for name in ("exp_avg", "exp_avg_sq")], "optimizer")
        optimizer.zero_grad()
    assert dict(meter.live) == {"weights": 20_000, "gradients": 0, "optimizer": 40_000, "activations": 4}  # its step


def test_the_peak_of_a_moment_is_that_of_its_own_time() -> None:
    meter = Meter()
    with meter:
        meter.moment("first")
        torch.ones(1000)  # gone at once
        meter.moment("second")
        kept = torch.ones(10)
    assert meter.peaks["first"]["activations"] == 4000
    assert meter.peaks["second"]["activations"] == kept.numel() * 4


def test_shares_decide_where_the_peak_is() -> None:
    meter = Meter({"weights": 0.25})
    meter.moment("all")
    weights = meter.made("weights", lambda: torch.ones(1000))
    with meter:
        activations = torch.ones(300)
    assert meter.total(meter.live) == 0.25 * 4 * weights.numel() + 4 * activations.numel()
    assert dict(meter.events()) == {0: 1000, 1: 1200}


def test_shapes_that_depend_on_integers_are_those_of_the_integers() -> None:
    chosen = torch.tensor([True, False, True, True])
    with Meter():
        rows = torch.ones(4, 7, requires_grad=True)
        picked = rows[chosen]
        picked.sum().backward()
    assert picked.shape == (3, 7)
    assert rows.grad is not None
    assert rows.grad.shape == (4, 7)


def test_no_numbers_are_made() -> None:
    with Meter() as meter:
        huge = torch.ones(1 << 20, 1 << 20) @ torch.ones(1 << 20, 1 << 20)  # 4 TiB each
    assert meter.live["activations"] == huge.numel() * 4
