"""Kernels that take documents of uneven lengths in one call: on a GPU, in half precision.

None of this has been run on a GPU: tests put a reference in the kernel's place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_sft.attention.documents import Documents, computed_in

Kernel = Callable[..., Tensor]
"""From queries, keys, values ``[N, heads, head size]``, documents, scale, dropout to ``[N, heads, head size]``."""


def attend(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float, dropout: float) -> Tensor:
    """Attention of all documents in one call; heads come second, ``[1, heads, N, head size]``, as in transformers."""
    _, kernel = usable(dropout)
    assert kernel is not None, "why_not was not asked"
    dtype = computed_in(query)
    tokens = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    return kernel(*tokens, documents, scale, dropout)[None]  # [1, N, heads, head size]


def why_not(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> str | None:
    """Why no kernel can be called, or ``None`` if one can."""
    if not query.is_cuda:
        return f"they need a GPU, and this is a {query.device.type}"
    if computed_in(query) not in (torch.float16, torch.bfloat16):
        return f"they need 16 bits, and attention is computed in {computed_in(query)}"
    if not query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256 or query.shape[-1] % 8:
        return "they need heads of one size, a multiple of 8 up to 256"
    if torch.version.cuda is None or torch.cuda.get_device_capability(query.device) < (8, 0):
        return "they need an NVIDIA GPU of compute capability 8.0 or above"
    if torch.are_deterministic_algorithms_enabled():
        return "their backward pass is not deterministic, and trainer.deterministic asks for it"
    return usable(dropout)[0]


def usable(dropout: float = 0.0) -> tuple[str | None, Kernel | None]:
    """The first kernel that is installed here, or why there is none."""
    reasons = []
    for name, (reason, kernel, drops) in installed().items():
        if kernel is not None and (drops or not dropout):
            return None, kernel
        reasons.append(f"{name}: {reason or 'it has no dropout'}")
    return "; ".join(reasons), None


@cache
def installed() -> dict[str, tuple[str | None, Kernel | None, bool]]:
    """All kernels in the order of preference: why each is off, the kernel, and whether it can drop out."""
    return {
        "flash_attn 3": _of_flash_attn("flash_attn_interface"),
        "torch's varlen_attn": _of_torch(),
        "flash_attn 2": _of_flash_attn("flash_attn"),
    }


def _of_flash_attn(package: str) -> tuple[str | None, Kernel | None, bool]:
    try:
        function: Any = getattr(__import__(package), "flash_attn_varlen_func")  # noqa: B009 - the package may be absent
    except (ImportError, AttributeError):
        return f"package {package} is not installed", None, False
    drops = "dropout_p" in inspect.signature(function).parameters

    def kernel(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, dropout: float) -> Tensor:
        bounds, longest = documents.bounds, documents.longest
        window = (-1, -1) if documents.window is None else (documents.window - 1, 0)
        options = {"softmax_scale": scale, "causal": True, "window_size": window}
        if dropout:
            options["dropout_p"] = dropout
        out = function(q, k, v, bounds, bounds, max_seqlen_q=longest, max_seqlen_k=longest, **options)
        attended: Tensor = out[0] if isinstance(out, tuple) else out
        return attended

    return None, kernel, drops


def _of_torch() -> tuple[str | None, Kernel | None, bool]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "this torch has none", None, False
    if not {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return "that of this torch knows no windows or grouped heads", None, False

    def kernel(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, dropout: float) -> Tensor:
        bounds, longest = documents.bounds, documents.longest
        window = (-1, 0) if documents.window is None else (documents.window - 1, 0)
        grouped = q.shape[1] != k.shape[1]
        options = {"scale": scale, "window_size": window, "enable_gqa": grouped}
        attend: Callable[..., Any] = varlen_attn
        attended: Tensor = attend(q, k, v, bounds, bounds, longest, longest, **options)
        return attended

    return None, kernel, False
