"""Attention on a CPU by torch's own kernels, the backward pass of short documents in 32 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_sft.model.attention import cpu
from lightning_sft.model.attention import per_document as implementation
from lightning_sft.model.attention.documents import Documents
from lightning_sft.model.attention.operator import packed_attention
from tests.model.attention.reference import attend_one_by_one
from tests.model.attention.test_per_document import SCALE, layer, mask_of, positions_of, random_tensors, through_ours

LENGTHS = [7, 1, 400, 12]  # one of them is not short
EPSILONS = {torch.float64: 10, torch.float32: 10, torch.bfloat16: 2, torch.float16: 2}  # roundings of a dtype


def attend(tensors: list[Tensor], lengths: list[int], window: int | None = None) -> Tensor:
    documents = Documents(lengths, window)
    given = documents.bounds, documents.longest, window or 0, SCALE, 0.0
    return packed_attention(*(x[0] for x in tensors), *given)[0]  # [T, heads, head size]


def gradients(out: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((out.to(upstream) * upstream).sum(), tensors))


def errors(values: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [
        ((x.detach().double() - y.detach()).norm() / y.detach().norm()).item()
        for x, y in zip(values, wanted, strict=True)
    ]


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("dtype", EPSILONS)
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (2, 1)])
def test_it_is_as_near_to_the_definition_as_its_inputs_are_rounded(
    dtype: torch.dtype, heads: int, groups: int, window: int | None
) -> None:
    tensors = random_tensors((1, sum(LENGTHS)), heads, groups, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    own = attend(tensors, LENGTHS, window)
    wanted = attend_one_by_one(*(x[0] for x in exact), LENGTHS, window, SCALE)
    assert own.dtype == dtype
    assert own.shape == wanted.shape
    epsilon = torch.finfo(dtype).eps * EPSILONS[dtype]
    assert max(errors([own], [wanted])) < epsilon
    assert max(errors(gradients(own, tensors), gradients(wanted, exact))) < epsilon


def test_the_operator_keeps_the_rules_of_torch() -> None:
    """Shapes without values, gradients, no aliases: what torch.compile relies on."""
    documents = Documents([3, 5], 2)
    tensors = [x[0].detach().requires_grad_() for x in random_tensors((1, 8), 4, 2, torch.float64)]
    torch.library.opcheck(packed_attention, (*tensors, documents.bounds, documents.longest, 2, SCALE, 0.0))


def test_under_autocast_it_takes_the_place_of_stock_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    module, positions = layer(4, 2, None, "per_document"), positions_of(LENGTHS)
    tensors, called = random_tensors((1, sum(LENGTHS)), 4, 2, torch.float32), []
    monkeypatch.setattr(implementation, "packed_attention", lambda *given: called.append(1) or packed_attention(*given))
    with torch.autocast("cpu", torch.bfloat16):
        own = through_ours(module, tensors, mask_of(module.config, positions, torch.float32))
        monkeypatch.setattr(implementation, "one_call", lambda device: None)
        stock = through_ours(module, tensors, mask_of(module.config, positions, torch.float32))
    assert called == [1]
    assert own.dtype == stock.dtype == torch.bfloat16
    assert torch.equal(own, stock)
    for mine, theirs in zip(gradients(own, tensors), gradients(stock, tensors), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 0.01
        assert mine.dtype == torch.float32


def test_dropout_and_heads_of_two_sizes_go_document_by_document() -> None:
    takes = cpu.one_call()
    assert takes is not None
    query, key, value = (x.transpose(1, 2) for x in random_tensors((1, 8), 2, 1, torch.float32))
    assert takes.takes(query, key, value, 0.0)
    assert not takes.takes(query, key, value, 0.1)
    assert not takes.takes(query, key, value[..., :4], 0.0)


def test_kernels_that_compute_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for forget in (cpu.works, cpu.one_call):
        forget.cache_clear()
    monkeypatch.setattr(cpu, "packed_attention", lambda query, *_: (query * 2,))
    assert cpu.one_call() is None
    for forget in (cpu.works, cpu.one_call):
        forget.cache_clear()
    monkeypatch.undo()
    assert cpu.one_call() is not None
