"""The calls of GPU kernels, with a reference on the CPU in the kernels' place: no test here runs on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sft.attention import varlen
from tests.attention.reference import attend_one_by_one
from tests.attention.test_implementation import SCALE, layer, mask_of, positions_of, random_tensors, through_ours

LENGTHS = [7, 1, 12]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    varlen.installed.cache_clear()
    yield
    varlen.installed.cache_clear()


def reference(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, causal: bool, window: tuple[int, int], scale: float
) -> Tensor:
    """What the kernels' documentation says of their arguments."""
    assert bounds.dtype == torch.int32
    assert bounds.diff().max() == longest
    assert causal
    left, right = window
    assert right in (0, -1)
    return attend_one_by_one(q, k, v, bounds.diff().tolist(), None if left == -1 else left + 1, scale)


def torchs(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: Any = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return reference(query, key, value, cu_seq_q, max_q, window_size[1] == 0, window_size, scale)


def flash_attns(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k
    attended = reference(q, k, v, cu_seqlens_q, max_seqlen_q, causal, window_size, softmax_scale)
    return attended * (1 - dropout_p)  # so that a test can see what it was told


@pytest.fixture(params=["torch", "flash_attn", "flash_attn_interface"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for package in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, package, None)  # not installed
    if request.param == "torch":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torchs)
    else:
        monkeypatch.delattr("torch.nn.attention.varlen.varlen_attn")
        package = ModuleType(request.param)
        package.flash_attn_varlen_func = flash_attns
        monkeypatch.setitem(sys.modules, request.param, package)
    monkeypatch.setattr(varlen, "why_not", lambda query, key, value, dropout: varlen.usable(dropout)[0])
    return str(request.param)


@pytest.mark.parametrize("window", [None, 4, 50])
@pytest.mark.parametrize("two_rows", [False, True])
def test_one_call_is_given_what_makes_it_attention_within_each_document(
    kernel: str, window: int | None, two_rows: bool
) -> None:
    module = layer(4, 2, window, "per_document")
    positions = torch.cat([positions_of(LENGTHS)] * (1 + two_rows))
    tensors = random_tensors((1 + two_rows, 20), 4, 2, torch.float64)
    own = through_ours(module, tensors, mask_of(module.config, positions, torch.float64))
    for row in range(1 + two_rows):
        wanted = attend_one_by_one(*(x[row] for x in tensors), LENGTHS, window, SCALE)
        assert (own[row] - wanted).abs().max() <= 1e-10
    assert torch.autograd.grad(own.sum(), tensors)[0].isfinite().all()


def test_a_kernel_that_has_no_dropout_is_not_given_any(kernel: str) -> None:
    module = layer(2, 1, None, "per_document")
    mask = mask_of(module.config, positions_of([4]), torch.float64)
    tensors = random_tensors((1, 20), 2, 1, torch.float64)
    mask = mask_of(module.config, positions_of(LENGTHS), torch.float64)
    without, dropped = (through_ours(module, tensors, mask, dropout=p) for p in (0.0, 0.25))
    if kernel == "torch":
        assert "it has no dropout" in str(varlen.usable(0.25)[0])
        assert (dropped == 0).any()  # by torch's own attention: a first token sees only itself, or nothing
    else:
        assert torch.allclose(dropped, without * 0.75)


def test_soft_caps_and_sinks_never_meet_a_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "attend", lambda *_: pytest.fail("a kernel was called"))
    module = layer(2, 1, None, "per_document_eager")
    mask = mask_of(module.config, positions_of(LENGTHS), torch.float64)
    through_ours(module, random_tensors((1, 20), 2, 1, torch.float64), mask)


def test_why_no_kernel_is_called_can_be_read() -> None:
    q = torch.zeros(1, 2, 3, 8)
    assert varlen.why_not(q, q, q, 0.0) == "they need a GPU, and this is a cpu"
    reasons = {name: reason for name, (reason, kernel, _) in varlen.installed().items() if kernel is None}
    assert all(reasons.values())


def test_the_arguments_are_those_of_the_kernel_of_this_torch() -> None:
    """The reference above cannot tell whether torch has what it is asked for."""
    pytest.importorskip("torch.nn.attention.varlen")
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    assert set(inspect.signature(torchs).parameters) <= set(inspect.signature(varlen_attn).parameters)
    assert varlen.installed()["torch's varlen_attn"][1] is not None
