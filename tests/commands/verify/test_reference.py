"""The reference is the formula."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_sft.commands.verify.reference import gradients_alone, log_probs_alone, relative_errors
from lightning_sft.demos import tiny_model
from lightning_sft.types import Example


def test_log_probs_are_those_of_torchs_cross_entropy() -> None:
    model = tiny_model()
    example = Example([5, 6, 7, 8], [0.0, 0.0, 1.0, 0.5])
    log_probs, weights = log_probs_alone(model, example)
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0]
    expected = -torch.nn.functional.cross_entropy(logits[1:3].double(), torch.tensor([7, 8]), reduction="none")
    assert torch.allclose(log_probs, expected, rtol=1e-6)
    assert weights.tolist() == [1.0, 0.5]


def test_gradients_are_those_of_finite_differences() -> None:
    model = tiny_model("gpt2").double().eval()  # no layer of it computes in float32
    examples = [Example([5, 6, 7], [0.0, 0.0, 1.0]), Example([8, 9], [0.0, 3.0])]

    def loss() -> float:
        found = [log_probs_alone(model, example) for example in examples]
        return -float(sum((p.detach() * w).sum() for p, w in found)) / 4.0

    name, step = "transformer.h.0.mlp.c_fc.weight", 1e-4
    gradient = gradients_alone(model, examples)[name][1, 2]
    parameter = model.get_parameter(name).data
    parameter[1, 2] += step
    above = loss()
    parameter[1, 2] -= 2 * step
    assert float(gradient) == pytest.approx((above - loss()) / (2 * step), rel=1e-3)


def test_a_missing_gradient_is_an_error_of_at_least_one_and_one_that_is_no_number_stays() -> None:
    one, nan = torch.ones(2, dtype=torch.float64), torch.full((2,), float("nan"), dtype=torch.float64)
    assert relative_errors({}, {"a": one})["a"] >= 1.0
    assert relative_errors({"a": one, "b": one}, {"a": one})["b"] >= 1.0
    assert relative_errors({"a": one, "b": 0 * one}, {"a": one})["b"] == 0.0
    assert math.isnan(relative_errors({"a": nan}, {"a": one})["a"])
