"""What the likelihood computes in which dtype: sums in float32, gradients rounded once, whatever the parameters are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sft.objective import log_likelihood
from lightning_sft.types import IGNORE
from tests.helpers.likelihoods import Operations, large_case

HALVES = [torch.bfloat16, torch.float16]


def exact_gradients(hidden: Tensor, head: nn.Linear, labels: Tensor, factor: float) -> list[Tensor]:
    """Those of factor · Σ log Pr, of the very same values of states and weights, in float64."""
    states, weight = hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    total = -nn.functional.cross_entropy((states @ weight.T)[0], labels[0], ignore_index=IGNORE, reduction="sum")
    return list(torch.autograd.grad(factor * total, [states, weight]))


def gradients(
    hidden: Tensor, head: Any, labels: Tensor, factor: float, chunk_size: int, autocast: torch.dtype | None = None
) -> list[Tensor]:
    weight = head if isinstance(head, Tensor) else head.weight
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        total, _ = log_likelihood(hidden, head, labels, chunk_size=chunk_size)
    return list(torch.autograd.grad(factor * total, [hidden, weight]))


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_does_not_round_the_sum(dtype: torch.dtype) -> None:
    """8,192 targets of 8.5 nats are −69,632, beyond float16; in bfloat16 they would be off by up to 128."""
    vocabulary, targets = round(math.exp(8.5)), 8192
    hidden, labels = torch.zeros(1, targets, 4), torch.arange(targets)[None] % vocabulary
    head = torch.zeros(vocabulary, 4, requires_grad=True)
    with torch.autocast("cpu", dtype):
        likelihood = log_likelihood(hidden, head, labels, chunk_size=2048)
    assert likelihood.total.dtype == torch.float32
    assert likelihood.total == likelihood.log_probs.sum()
    assert likelihood.total.item() == pytest.approx(-targets * math.log(vocabulary), rel=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_does_not_round_the_factor(dtype: torch.dtype) -> None:
    """1 / 3000 is 0.14 % off in bfloat16, and every gradient of the step would be."""
    hidden, head, labels = large_case(targets=40)
    with torch.autocast("cpu", dtype):
        total, _ = log_likelihood(hidden, head, labels)
        plain = torch.autograd.grad(total, [hidden, head.weight], retain_graph=True)
        scaled = torch.autograd.grad(total / 3000, [hidden, head.weight])
    for of_sum, of_mean in zip(plain, scaled, strict=True):
        assert of_mean.dtype == torch.float32
        assert torch.allclose(of_mean, of_sum / 3000, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_parameters_get_a_gradient_that_is_rounded_after_the_factor(dtype: torch.dtype) -> None:
    hidden, head, labels = large_case(targets=40, dtype=dtype)
    total, _ = log_likelihood(hidden, head, labels, chunk_size=4)
    [of_sum] = torch.autograd.grad(total, [head.weight], retain_graph=True)
    [of_ninth] = torch.autograd.grad(total / 9, [head.weight])
    assert of_sum.dtype == of_ninth.dtype == dtype
    exact = exact_gradients(hidden, head, labels, 1 / 9)[1]
    assert error(of_ninth, exact) < error((of_sum.float() / 9).to(dtype), exact)  # which is rounded twice


SETTINGS = [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("dtype", "autocast"), SETTINGS)
@pytest.mark.parametrize("kind", ["matrix", "module", "autograd"])
def test_the_result_does_not_depend_on_the_chunk_size(
    kind: str, dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    hidden, head, labels = large_case(targets=64 * 7, dtype=dtype)
    exact = exact_gradients(hidden, head, labels, 1 / 448)
    if kind == "autograd":
        head.register_forward_hook(lambda module, args, output: None)
    given = head.weight if kind == "matrix" else head
    errors = {}
    for num_chunks in (1, 7, 64):
        got = gradients(hidden, given, labels, 1 / 448, len(labels[0]) // num_chunks, autocast)
        assert [g.dtype for g in got] == [dtype, dtype]
        errors[num_chunks] = [error(g, e) for g, e in zip(got, exact, strict=True)]
    floor = torch.finfo(dtype).eps
    for num_chunks in (7, 64):
        for here, whole in zip(errors[num_chunks], errors[1], strict=True):
            assert here <= 1.25 * whole + floor / 8, errors


def test_tied_16_bit_embeddings_get_both_gradients_each_rounded_once() -> None:
    _, head, labels = large_case(targets=64 * 7, dtype=torch.bfloat16)
    ids = torch.arange(labels.numel())[None] % head.weight.shape[0]
    weight = head.weight.detach().double().requires_grad_()
    total = -nn.functional.cross_entropy((weight[ids] @ weight.T)[0], labels[0], ignore_index=IGNORE, reduction="sum")
    exact = torch.autograd.grad(total / 448, weight)[0]
    errors = []
    for chunk_size in (448, 7):
        total, _ = log_likelihood(head.weight[ids], head, labels, chunk_size=chunk_size)
        errors.append(error(torch.autograd.grad(total / 448, head.weight)[0], exact))
    assert errors[1] <= 1.25 * errors[0]


@pytest.fixture
def nan_where_uninitialized() -> Iterator[None]:
    """With deterministic algorithms, torch fills what it does not initialize with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_where_uninitialized")
def test_a_bias_is_trained_as_the_formula_has_it() -> None:
    hidden, _, labels = large_case(targets=40, dtype=torch.float64)
    head = nn.Linear(32, 48, dtype=torch.float64)
    total, _ = log_likelihood(hidden, head, labels, chunk_size=7)
    wanted = -nn.functional.cross_entropy(head(hidden)[0], labels[0], ignore_index=IGNORE, reduction="sum")
    inputs = [hidden, head.weight, head.bias]
    for got, reference in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        assert torch.allclose(got, reference, atol=1e-12)


def test_hooks_on_a_head_are_run_and_differentiated() -> None:
    """model.new_tokens puts one there: what the matrix alone gives is then not the output."""
    hidden, head, labels = large_case(targets=40)
    head.factor = nn.Parameter(torch.tensor(2.0))
    head.register_forward_hook(lambda module, args, output: output * module.factor)
    total, _ = log_likelihood(hidden, head, labels, chunk_size=7)
    wanted = -nn.functional.cross_entropy(head(hidden)[0], labels[0], ignore_index=IGNORE, reduction="sum")
    inputs = [hidden, head.weight, head.factor]
    for got, reference in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        assert torch.allclose(got, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_trained", [True, False])
def test_the_head_is_cast_once_and_not_for_each_chunk(is_trained: bool) -> None:
    hidden, head, labels = large_case(targets=64)
    head.requires_grad_(is_trained)
    with Operations(tuple(head.weight.shape)) as operations, torch.autocast("cpu", torch.bfloat16):
        log_likelihood(hidden, head, labels, chunk_size=8)
    casts = [dtype for func, dtype in operations.made if func is torch.ops.aten._to_copy.default]
    assert casts == [torch.bfloat16]


def test_a_frozen_head_is_neither_cast_nor_differentiated() -> None:
    hidden, head, labels = large_case(targets=64)
    head.requires_grad_(False)
    with Operations(tuple(head.weight.shape)) as operations:
        log_likelihood(hidden, head, labels, chunk_size=8).total.backward()
    assert operations.made == []
    assert hidden.grad is not None


def test_one_buffer_holds_the_gradient_of_the_head() -> None:
    """Whatever the number of chunks: products are added in place, and the factor is multiplied in place."""
    hidden, head, labels = large_case(targets=64)
    with Operations(tuple(head.weight.shape)) as operations:
        (log_likelihood(hidden, head, labels, chunk_size=8).total / 64).backward()
    assert operations.made == [(torch.ops.aten.empty_like.default, torch.float32)]


def test_16_bit_products_are_added_to_one_float32_buffer_and_rounded_once() -> None:
    hidden, head, labels = large_case(targets=64, dtype=torch.bfloat16)
    with Operations(tuple(head.weight.shape)) as operations:
        (log_likelihood(hidden, head, labels, chunk_size=8).total / 64).backward()
    kept = [dtype for func, dtype in operations.made if func is not torch.ops.aten.mm.default]  # a CPU has no other
    assert kept == [torch.float32, torch.bfloat16]


def test_the_gradient_of_the_logits_takes_their_place() -> None:
    hidden, head, labels = large_case(targets=64)
    with Operations((8, head.weight.shape[0])) as operations:
        log_likelihood(hidden, head, labels, chunk_size=8)
    per_chunk = len(operations.made) / 8
    assert per_chunk == 3  # the logits, what is below the largest, its exponentials


def test_backward_twice_through_a_kept_graph_gives_the_same_gradients() -> None:
    hidden, head, labels = large_case(targets=40)
    total, _ = log_likelihood(hidden, head, labels)
    first = [g.clone() for g in torch.autograd.grad(total / 3, [hidden, head.weight], retain_graph=True)]
    second = torch.autograd.grad(total / 3, [hidden, head.weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("is_linear", [True, False])
def test_second_derivatives_are_refused_rather_than_taken_as_zero(is_linear: bool) -> None:
    hidden, head, labels = large_case(targets=40)
    total, _ = log_likelihood(hidden, head, labels)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(total if is_linear else total.square(), [hidden], create_graph=True)
