from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sft import objective
from lightning_sft.head.chunks import automatic_chunk_size, fitting_chunk_size, slices
from lightning_sft.objective import log_likelihood
from lightning_sft.types import IGNORE, InputError
from tests.helpers.likelihoods import Operations


def case(targets: int = 9, dtype: torch.dtype = torch.float32) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(2, 8, 6, dtype=dtype, requires_grad=True)
    head = nn.Linear(6, 11, bias=False, dtype=dtype)
    labels = torch.full((16,), IGNORE)
    labels[torch.randperm(16)[:targets]] = torch.randint(11, (targets,))
    return hidden, head, labels.view(2, 8), torch.rand(2, 8, dtype=torch.float64)


def formula(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, scale: float, cap: float | None) -> Tensor:
    """Σ w · log Pr(y), position by position, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for states, row, row_weights in zip(hidden.double(), labels, weights, strict=True):
        for state, label, w in zip(states, row, row_weights, strict=True):
            if label != IGNORE:
                logits = weight.double() @ state * scale
                logits = logits if cap is None else cap * (logits / cap).tanh()
                total = total + w * (logits[label] - logits.exp().sum().log())
    return total


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 1.5), (3.0, 2.0)])
@pytest.mark.parametrize("chunk_size", [1, 4, 9, 1000])
def test_value_and_gradients_are_those_of_the_formula(scale: float, softcap: float | None, chunk_size: int) -> None:
    hidden, head, labels, weights = case()
    total, weight = log_likelihood(hidden, head, labels, weights, scale=scale, softcap=softcap, chunk_size=chunk_size)
    (3 * total).backward()
    got = hidden.grad, head.weight.grad
    hidden.grad = head.weight.grad = None
    expected = formula(hidden, head.weight, labels, weights, scale, softcap)
    (3 * expected).backward()
    assert abs(total.item() / expected.item() - 1) <= 1e-6
    assert weight.item() == pytest.approx(weights[labels != IGNORE].sum().item(), rel=1e-6)
    for gradient, wanted in zip(got, (hidden.grad, head.weight.grad), strict=True):
        assert (gradient - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_gradients_pass_gradcheck_in_float64() -> None:
    hidden, head, labels, weights = case(dtype=torch.float64)

    def total(states: Tensor, weight: Tensor) -> Tensor:
        return log_likelihood(states, weight, labels, weights, softcap=2.0, chunk_size=4).total

    assert torch.autograd.gradcheck(total, (hidden, head.weight))


def test_no_targets_give_a_connected_zero() -> None:
    hidden, head, labels, _ = case(targets=0)
    total, weight = log_likelihood(hidden, head, labels)
    total.backward()
    assert total.item() == weight.item() == 0
    assert hidden.grad is not None
    assert head.weight.grad is not None
    assert not hidden.grad.any()
    assert not head.weight.grad.any()


def test_only_targets_reach_the_head() -> None:
    hidden, head, labels, _ = case(targets=5)
    seen: list[int] = []
    head.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    log_likelihood(hidden, head, labels, chunk_size=2)
    assert seen == [2, 2, 1]


def test_weights_are_honoured_down_to_zero_and_need_no_labels_removed() -> None:
    hidden, head, labels, weights = case()
    weights[0] = 0
    total, weight = log_likelihood(hidden, head, labels, weights)
    only, same = log_likelihood(hidden[1:], head, labels[1:], weights[1:])
    assert (total - only).abs() <= 1e-6 * only.abs()
    assert weight == same


def test_a_frozen_head_gets_no_gradient_but_the_states_do() -> None:
    hidden, head, labels, _ = case()
    head.requires_grad_(False)
    log_likelihood(hidden, head, labels).total.backward()
    assert head.weight.grad is None
    assert hidden.grad is not None


def test_a_head_alone_can_be_trained() -> None:
    hidden, head, labels, _ = case()
    log_likelihood(hidden.detach(), head, labels).total.backward()
    assert head.weight.grad is not None


def test_tied_weights_get_both_gradients() -> None:
    _, head, labels, _ = case()
    ids = torch.randint(11, (2, 8))
    log_likelihood(head.weight[ids], head, labels).total.backward()
    tied = head.weight.grad
    separate = head.weight.detach().clone().requires_grad_()
    log_likelihood(separate[ids], head.weight.detach(), labels).total.backward()
    head.weight.grad = None
    log_likelihood(head.weight.detach()[ids], head, labels).total.backward()
    assert torch.allclose(tied, head.weight.grad + separate.grad, atol=1e-6)


def test_without_gradients_nothing_is_differentiated_and_the_value_is_the_same() -> None:
    hidden, head, labels, weights = case()
    with torch.inference_mode():
        quiet = log_likelihood(hidden, head, labels, weights)
    assert not quiet.total.requires_grad
    assert quiet.total == log_likelihood(hidden, head, labels, weights).total


def test_log_probs_and_correct_tell_each_target_in_order() -> None:
    hidden, head, labels, _ = case()
    likelihood = log_likelihood(hidden, head, labels, chunk_size=4)
    logits = head(hidden)[labels != IGNORE]
    targets = labels[labels != IGNORE]
    assert torch.allclose(
        likelihood.log_probs, logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1), atol=1e-6
    )
    assert torch.equal(likelihood.correct, logits.argmax(-1) == targets)


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
@pytest.mark.parametrize("spread", [0.3, 30.0])
def test_entropy_is_that_of_each_prediction(spread: float, chunk_size: int) -> None:
    _, _, labels, weights = case()
    logits = spread * torch.randn(2, 8, 11)
    likelihood = log_likelihood(logits, nn.Identity(), labels, weights, chunk_size=chunk_size)
    log_probs = logits[labels != IGNORE].double().log_softmax(-1)
    wanted = -(log_probs.exp() * log_probs).sum(-1)
    assert wanted.min() > 2 if spread < 1 else wanted.min() < 0.01  # nearly uniform, nearly certain
    assert (likelihood.entropy - wanted).abs().max() <= 1e-6
    assert not likelihood.entropy.requires_grad


def test_bfloat16_logits_are_summed_in_float32() -> None:
    hidden, head, labels, _ = case(dtype=torch.bfloat16)
    total, weight = log_likelihood(hidden, head, labels)
    assert total.dtype == weight.dtype == torch.float32


WRONG = [{"labels": torch.zeros(2, 7)}, {"weights": torch.ones(2, 7)}, {"chunk_size": 0}, {"chunk_size": 2.5}]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_shapes_and_sizes_are_refused(wrong: dict[str, object]) -> None:
    hidden, head, labels, _ = case()
    with pytest.raises(InputError, match="must be"):
        log_likelihood(**{"hidden": hidden, "head": head, "labels": labels, **wrong})


def test_a_head_that_returns_its_input_leaves_the_hidden_states_as_they_are() -> None:
    hidden, labels = torch.randn(1, 5, 7), torch.tensor([[1, IGNORE, 6, 0, 2]])
    before = hidden.clone()
    total, _ = log_likelihood(hidden.requires_grad_(), nn.Identity(), labels, chunk_size=2)
    assert torch.equal(hidden, before)
    wanted = -nn.functional.cross_entropy(hidden[0], labels[0], reduction="sum")
    assert torch.allclose(total, wanted)
    [got], [reference] = torch.autograd.grad(total, hidden), torch.autograd.grad(wanted, hidden)
    assert torch.allclose(got, reference, atol=1e-6)


def test_logits_too_large_for_their_exponentials_are_no_problem() -> None:
    hidden = torch.tensor([[[1e5, -1e5, 9.9e4], [-1e30, -torch.inf, -1e30]]], requires_grad=True)
    likelihood = log_likelihood(hidden, nn.Identity(), torch.tensor([[0, 2]]))
    total, _ = likelihood
    assert total.item() == pytest.approx(math.log(0.5))
    assert likelihood.entropy.tolist() == pytest.approx([0, math.log(2)])
    total.backward()
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [0, 0, 0, -0.5, 0, 0.5]


def test_with_indices_nothing_looks_for_the_targets_and_the_result_is_the_same() -> None:
    """Looking for them, the host waits for the device."""
    hidden, head, labels, weights = case()
    indices = (labels.flatten() != IGNORE).nonzero().squeeze(1)
    wanted = log_likelihood(hidden, head, labels, weights)
    with Operations(()) as operations:
        got = log_likelihood(hidden, head, labels, weights, indices=indices)
        gradients = torch.autograd.grad(got.total, [hidden, head.weight])
    waits = [torch.ops.aten.nonzero, torch.ops.aten.index, torch.ops.aten._local_scalar_dense, torch.ops.aten.equal]
    assert not {func.overloadpacket for func in operations.seen} & set(waits)
    assert torch.equal(got.total, wanted.total)
    assert torch.equal(got.weight, wanted.weight)
    for gradient, reference in zip(gradients, torch.autograd.grad(wanted.total, [hidden, head.weight]), strict=True):
        assert torch.equal(gradient, reference)


@pytest.mark.parametrize("total", [0, 1, 8, 9, 63, 64])
@pytest.mark.parametrize("even", [True, False])
def test_chunks_cover_all_targets_once_even_ones_or_full_ones(total: int, even: bool) -> None:
    found = list(slices(total, 8, even))
    assert [i for chunk in found for i in range(total)[chunk]] == list(range(total))
    sizes = [chunk.stop - chunk.start for chunk in found]
    assert max(sizes, default=0) <= 8
    assert len(sizes) == -(-total // 8)
    if even:
        assert max(sizes, default=0) - min(sizes, default=0) <= 1
    else:
        assert set(sizes[:-1]) <= {8}


@pytest.mark.parametrize("vocabulary", [32_000, 151_936, 262_144])
@pytest.mark.parametrize("gib", [0, 8, 24, 80, 180])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_chunk_of_logits_takes_at_most_a_64th_of_the_devices_memory(vocabulary: int, gib: int, itemsize: int) -> None:
    size = fitting_chunk_size(gib * 2**30, vocabulary, itemsize)
    assert size.bit_count() == 1
    assert 512 <= size <= 8192
    assert size == 512 or size * vocabulary * itemsize <= gib * 2**30 / 64
    assert size == 8192 or 2 * size * vocabulary * itemsize > gib * 2**30 / 64


def test_a_cpu_takes_512_targets_at_a_time_by_default() -> None:
    hidden, head, _, _ = case()
    assert automatic_chunk_size(head, hidden) == 512


@pytest.mark.parametrize(("cached", "rows"), [(1, 1), (22, 2), (33, 3), (44, 3), (10_000, 9)])
def test_the_softmax_is_taken_of_even_blocks_that_a_cache_holds(
    cached: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, head, labels, weights = case()
    seen = []

    def record(raw: Tensor, *rest: Any) -> None:
        seen.append(len(raw))
        of_rows(raw, *rest)

    of_rows = objective._softmax_of_rows
    whole = log_likelihood(hidden, head, labels, weights, chunk_size=9)
    monkeypatch.setattr(objective, "_softmax_of_rows", record)
    monkeypatch.setattr(objective, "_CACHED", cached)  # logits, of 11 tokens
    parts = log_likelihood(hidden, head, labels, weights, chunk_size=9)
    assert (max(seen), sum(seen)) == (rows, 9)
    assert torch.equal(parts.log_probs, whole.log_probs)
