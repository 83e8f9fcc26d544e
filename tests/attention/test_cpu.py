"""Attention in 16 bits on a CPU: torch's own kernels, the backward pass of short documents in 32 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sft.attention import halves
from tests.attention.reference import attend_one_by_one
from tests.attention.test_implementation import SCALE, layer, mask_of, positions_of, random_tensors, through_ours

LENGTHS = [7, 1, 400, 12]  # one of them is not short


def gradients(out: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((out.float() * upstream).sum(), tensors))


def errors(values: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [
        ((x.detach().double() - y.detach()).norm() / y.detach().norm()).item()
        for x, y in zip(values, wanted, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3), (2, 1)])
def test_it_is_as_near_to_the_definition_as_its_inputs_are_rounded(dtype: torch.dtype, heads: int, groups: int) -> None:
    halved = [x.detach().to(dtype).requires_grad_() for x in random_tensors((1, sum(LENGTHS)), heads, groups, dtype)]
    exact = [x.detach().double().requires_grad_() for x in halved]
    assert halves.can(*(x.transpose(1, 2) for x in halved), window=None, dropout=0.0)
    own = halves.attend(*(x.transpose(1, 2) for x in halved), LENGTHS, SCALE)
    wanted = attend_one_by_one(*(x[0] for x in exact), LENGTHS, None, SCALE)[None]
    assert own.dtype == dtype
    assert own.shape == wanted.shape
    epsilon = torch.finfo(dtype).eps
    assert max(errors([own], [wanted])) < epsilon
    assert max(errors(gradients(own, halved), gradients(wanted, exact))) < 2 * epsilon


def test_under_autocast_it_takes_the_place_of_stock_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    module, positions = layer(4, 2, None, "per_document"), positions_of(LENGTHS)
    tensors = random_tensors((1, sum(LENGTHS)), 4, 2, torch.float32)
    mask, called = mask_of(module.config, positions, torch.float32), []
    attend = halves.attend
    monkeypatch.setattr(halves, "attend", lambda *given: called.append(1) or attend(*given))
    with torch.autocast("cpu", torch.bfloat16):
        own = through_ours(module, tensors, mask)
        monkeypatch.setattr(halves, "can", lambda *_: False)
        stock = through_ours(module, tensors, mask)
    assert called == [1]
    assert own.dtype == stock.dtype == torch.bfloat16
    assert torch.equal(own, stock)
    for mine, theirs in zip(gradients(own, tensors), gradients(stock, tensors), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 0.01
        assert mine.dtype == torch.float32


@pytest.mark.parametrize(
    "other",
    [{"window": 3}, {"dropout": 0.1}, {"dtype": torch.float32}],
    ids=["window", "dropout", "32 bits"],
)
def test_everything_else_goes_to_stock_attention(other: dict[str, Any]) -> None:
    tensors = random_tensors((1, 8), 2, 1, other.get("dtype", torch.bfloat16))
    given = {"window": None, "dropout": 0.0} | {k: v for k, v in other.items() if k != "dtype"}
    assert not halves.can(*(x.transpose(1, 2) for x in tensors), **given)


def test_kernels_that_compute_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [x.transpose(1, 2) for x in random_tensors((1, 8), 2, 1, torch.bfloat16)]
    halves.works.cache_clear()
    monkeypatch.setattr(halves, "attend", lambda query, *_: query.transpose(1, 2) * 2)
    assert not halves.can(*tensors, window=None, dropout=0.0)
    halves.works.cache_clear()
    monkeypatch.undo()
    assert halves.can(*tensors, window=None, dropout=0.0)
