"""Attention of packed documents on a CPU in 16 bits, by torch's own kernels, chosen by measurement.

The forward pass takes 16 bits. Of the backward pass torch has two kernels, and that in 32 bits is the faster one for
short documents (twice as fast at 128 tokens, on two cores with AMX), so these go through it; what comes out is more
exact. All documents are one node of the graph: nothing is cut and glued again for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from lightning_sft.attention.documents import computed_in

_SHORT = 320  # tokens up to which a document's backward pass is faster in 32 bits


def can(query: Tensor, key: Tensor, value: Tensor, window: int | None, dropout: float) -> bool:
    """Whether :func:`attend` computes this."""
    plain = query.device.type == "cpu" and window is None and not dropout
    same_size = query.shape[-1] == key.shape[-1] == value.shape[-1]
    return plain and same_size and computed_in(query) in (torch.bfloat16, torch.float16) and works()


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> Tensor:
    """Causal attention within each document, ``[1, heads, N, head size]`` to ``[1, N, heads, head size]``."""
    documents: Any = _Documents  # torch gives autograd functions no types
    dtype = computed_in(query)
    out: Tensor = documents.apply(*(x.to(dtype) for x in (query, key, value)), lengths, scale)
    return out.transpose(1, 2)


class _Documents(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)
        sums = []  # the logarithm of each softmax's denominator
        for q, k, v, o in _each(lengths, query, key, value, out):
            attended, log_sum = kernel(q, k, v, 0.0, True, scale=scale)
            o.copy_(attended)
            sums.append(log_sum)
        ctx.lengths, ctx.scale = lengths, scale
        ctx.save_for_backward(query, key, value, out, *sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key, value, out, *sums = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (query, key, value)]
        documents = _each(ctx.lengths, *gradients, grad_out, query, key, value, out)
        for (*filled, g, q, k, v, o), log_sum in zip(documents, sums, strict=True):
            given = [x.float() if q.shape[2] <= _SHORT else x for x in (g, q, k, v, o)]
            for gradient, new in zip(filled, kernel(*given, log_sum, 0.0, True, scale=ctx.scale), strict=True):
                gradient.copy_(new)
        return (*gradients, None, None)


def _each(lengths: list[int], *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.split(lengths, dim=2) for x in tensors), strict=True)


@cache
def works() -> bool:
    """Whether this torch's kernels, which it does not document, do what its public function does."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 5, 8, generator=generator).bfloat16().requires_grad_() for heads in (4, 2, 2))
    try:
        with torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):  # a checkpoint would count its tensors
            own = attend(q, k, v, [5], 0.3).transpose(1, 2)
            stock = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
            pairs = [(own, stock), *zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (own, stock)), strict=True)]
    except (AttributeError, RuntimeError, TypeError):
        return False
    return all(torch.allclose(mine, theirs, atol=0.05, rtol=0.05) for mine, theirs in pairs)
