"""The calls of GPU kernels, with a reference on the CPU in the kernels' place: no test here runs on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sft.model.attention import gpu
from lightning_sft.model.attention.documents import Documents, OneCall
from tests.model.attention.reference import attend_one_by_one
from tests.model.attention.test_per_document import SCALE, random_tensors

LENGTHS = [7, 1, 12]


def attended(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, causal: bool, left: int, right: int, scale: float
) -> Tensor:
    """What the kernels' documentation says of their arguments: causal, or a window to the left alone."""
    assert bounds.dtype == torch.int32
    assert bounds.diff().max() == longest
    assert (causal and left == -1 and right in (-1, 0)) or (not causal and left >= 0 and right == 0)
    given = (x.double() for x in (q, k, v))
    return attend_one_by_one(*given, bounds.diff().tolist(), left + 1 if left >= 0 else None, scale).to(q)


def differentiated(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        given = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attended(*given, *settings), given, grad_out)


def of_torch() -> dict[str, Any]:
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bounds: Tensor,
        keys: Tensor,
        longest: int,
        longest_key: int,
        dropout: float,
        causal: bool,
        debug: bool,
        *,
        scale: float,
        window_size_left: int,
        window_size_right: int,
    ) -> Any:
        assert (bounds is keys, longest, debug) == (True, longest_key, False)
        out = attended(q, k, v, bounds, longest, causal, window_size_left, window_size_right, scale)
        return out, q.new_zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64), q.new_empty(0), q.new_empty(0)

    def backward(
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        log_sums: Tensor,
        bounds: Tensor,
        keys: Tensor,
        longest: int,
        longest_key: int,
        dropout: float,
        causal: bool,
        random_state: Tensor,
        unused: Tensor,
        *,
        scale: float,
        window_size_left: int,
        window_size_right: int,
    ) -> Any:
        return differentiated(grad_out, q, k, v, bounds, longest, causal, window_size_left, window_size_right, scale)

    return {"_flash_attention_forward": forward, "_flash_attention_backward": backward}


def of_flash_attn_3() -> dict[str, Any]:
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        is_causal: bool,
        window_size_left: int,
        window_size_right: int,
    ) -> Any:
        out = attended(
            q, k, v, cu_seqlens_q, max_seqlen_q, is_causal, window_size_left, window_size_right, softmax_scale
        )
        return out, q.new_zeros(q.shape[1], len(q)), None, None

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        *,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        is_causal: bool,
        window_size_left: int,
        window_size_right: int,
        deterministic: bool,
    ) -> Any:
        sizes = is_causal, window_size_left, window_size_right, softmax_scale
        for into, new in zip(
            (dq, dk, dv), differentiated(dout, q, k, v, cu_seqlens_q, max_seqlen_q, *sizes), strict=True
        ):
            into.copy_(new)

    return {"fwd": forward, "bwd": backward}


def of_flash_attn_2() -> dict[str, Any]:
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: Any = None,
    ) -> Any:
        out = attended(q, k, v, cu_seqlens_q, max_seqlen_q, causal, window_size_left, window_size_right, softmax_scale)
        return out, q.new_zeros(q.shape[1], len(q)), None, torch.zeros(2, dtype=torch.int64)

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Any,
        deterministic: bool,
        rng_state: Any = None,
    ) -> Any:
        sizes = causal, window_size_left, window_size_right, softmax_scale
        for into, new in zip(
            (dq, dk, dv), differentiated(dout, q, k, v, cu_seqlens_q, max_seqlen_q, *sizes), strict=True
        ):
            into.copy_(new)

    return {"_flash_attn_varlen_forward": forward, "_flash_attn_varlen_backward": backward}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    gpu.kernels.cache_clear()
    yield
    gpu.kernels.cache_clear()


@pytest.fixture(params=["torch's flash attention", "flash_attn 3", "flash_attn 2"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> gpu.Kernel:
    """One kernel alone is there, and what it calls computes by definition."""
    for package in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, package, None)  # not installed
    monkeypatch.setattr(gpu, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: request.param.startswith("torch"))
    if request.param.startswith("torch"):
        for name, function in of_torch().items():
            monkeypatch.setattr(torch.ops.aten, name, function)
    elif request.param == "flash_attn 3":
        monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
        monkeypatch.setattr(torch.ops, "flash_attn_3", SimpleNamespace(**of_flash_attn_3()), raising=False)
    else:
        module: Any = ModuleType("flash_attn.flash_attn_interface")
        vars(module).update(of_flash_attn_2())
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)
    found = gpu.kernels(torch.device("cpu"))
    assert [name for name, (reason, _) in found.items() if reason is None] == [request.param], found
    return gpu.chosen(torch.device("cpu"))


@pytest.mark.parametrize("window", [None, 4, 50])
def test_one_call_is_given_what_makes_it_attention_within_each_document(kernel: gpu.Kernel, window: int | None) -> None:
    documents = Documents(LENGTHS, window)
    tensors = [x[0] for x in random_tensors((1, 20), 4, 2, torch.float64)]
    settings = documents.bounds, int(documents.longest), window or 0, SCALE, 0.0
    with torch.no_grad():
        out, log_sums, random_state = kernel.forward(*tensors, *settings)
    wanted = attend_one_by_one(*tensors, LENGTHS, window, SCALE)
    upstream = torch.randn(wanted.shape, dtype=wanted.dtype, generator=torch.Generator().manual_seed(0))
    mine = kernel.backward(upstream, *tensors, out, log_sums, random_state, *settings)
    assert (random_state.dtype, random_state.shape) == (torch.uint64, (2,))
    assert (out - wanted).abs().max() <= 1e-10
    for own, right in zip(mine, torch.autograd.grad(wanted, tensors, upstream), strict=True):
        assert (own - right).abs().max() <= 1e-10


def test_a_kernel_that_computes_something_else_is_not_used(kernel: gpu.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.kernels.cache_clear()
    monkeypatch.setattr(sys.modules[__name__], "attend_one_by_one", lambda query, *_: query)
    reason, found = gpu.kernels(torch.device("cpu"))[kernel.name]
    assert found is None
    assert "fails on this GPU" in str(reason) or reason == "its results are wrong on this GPU"


def test_the_arguments_are_those_of_the_kernel_of_this_torch() -> None:
    """The reference above cannot tell whether torch has what it is asked for."""
    for name, function in of_torch().items():
        schema = [argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments]
        given = list(function.__code__.co_varnames[: function.__code__.co_argcount])
        assert len(given) == schema.index("scale")
        assert {"scale", "window_size_left", "window_size_right"} <= set(schema)


@pytest.mark.parametrize(
    ("capability", "name", "why"),
    [
        ((7, 5), "torch's flash attention", "it needs compute capability 8.0 or above"),
        ((8, 0), "flash_attn 3", "it needs compute capability 9.0"),
        ((10, 0), "flash_attn 3", "it needs compute capability 9.0"),
        ((9, 0), "flash_attn 3", "package flash_attn_interface is not installed"),
        ((8, 0), "flash_attn 2", "package flash_attn is not installed"),
    ],
)
def test_a_kernel_that_does_not_fit_the_card_says_why(
    capability: tuple[int, int], name: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(gpu, "_capability", lambda device: capability)
    assert gpu.kernels(torch.device("cpu"))[name] == (why, None)


@pytest.mark.parametrize("error", [ImportError("undefined symbol: _ZN3c10"), OSError("libcudart.so.11.0 is missing")])
def test_a_package_built_for_another_torch_is_not_said_to_be_missing(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> Any:
        raise error

    monkeypatch.setattr(gpu.importlib, "import_module", broken)
    monkeypatch.setattr(gpu, "_capability", lambda device: (9, 0))
    for package in ("flash_attn", "flash_attn_interface"):
        name = f"flash_attn {3 if 'interface' in package else 2}"
        reason, kernel = gpu.kernels(torch.device("cpu"))[name]
        assert (reason, kernel) == (f"package {package} cannot be imported ({error})", None)


def test_without_a_gpu_each_kernel_says_so() -> None:
    assert gpu.one_call(torch.device("cpu")) is None
    assert {reason for reason, _ in gpu.kernels(torch.device("cpu")).values()} == {"it needs a GPU visible to torch"}


@pytest.mark.parametrize(
    ("size", "dropout", "small", "takes"),
    [
        (64, 0.0, True, True), (64, 0.1, True, True), (60, 0.0, False, False), (256, 0.1, False, True),
        (264, 0.0, False, False), (208, 0.0, True, False), (256, 0.0, True, True), (256, 0.1, True, False),
    ],
)  # fmt: skip
def test_heads_that_a_card_cannot_do_go_document_by_document(
    size: int, dropout: float, small: bool, takes: bool
) -> None:
    query = torch.zeros(1, 2, 3, size, dtype=torch.bfloat16)
    call = OneCall((torch.bfloat16,), 256, drops_out=True, small_memory=small)
    assert call.takes(query, query, query, dropout) == takes
    assert not call.takes(query.float(), query.float(), query.float(), dropout)
