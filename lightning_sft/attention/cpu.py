"""Attention of packed documents on a CPU, by torch's own kernels, chosen by measurement.

All documents are one node of the graph: nothing is cut and glued again for each. In 16 bits, torch has two kernels for the
backward pass, and that in 32 bits is the faster one for short documents (twice as fast at 128 tokens, on two cores with
AMX), so these go through it; what comes out is more exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sft.attention.documents import Documents, OneCall
from lightning_sft.attention.operator import packed_attention, packed_attention_backward

_SHORT = 320  # tokens up to which a document's backward pass is faster in 32 bits


@cache
def one_call() -> OneCall | None:
    """What the operator takes on a CPU: everything but dropout, if the kernels do what torch's public function does."""
    dtypes = torch.float32, torch.float64, torch.bfloat16, torch.float16
    return OneCall(dtypes) if works() else None


@packed_attention.register_kernel("cpu")
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: Tensor,
    window: int,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`~lightning_sft.attention.operator.packed_attention`."""
    assert not dropout, "torch's kernels for CPUs have none"
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty(query.shape)
    log_sums = query.new_empty(query.shape[:2], dtype=precise).T  # tokens first, as the kernels have it
    for queries, keys, mask in _pieces(bounds, window):
        q, k, v = (_heads_first(x) for x in (query[queries], key[keys], value[keys]))
        attended, log_sum = kernel(q, k, v, 0.0, mask is None, attn_mask=_added(mask, q.dtype), scale=scale)
        _heads_first(out[queries]).copy_(attended)
        log_sums[:, queries] = log_sum[0]
    return out, log_sums.contiguous(), torch.zeros(2, dtype=torch.uint64, device="cpu")


@packed_attention_backward.register_kernel("cpu")
def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, random_state: Tensor,
    bounds: Tensor, longest: Tensor, window: int, scale: float, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`~lightning_sft.attention.operator.packed_attention_backward`."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    gradients = query.new_empty(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    log_sums = log_sums.T.contiguous().T
    for queries, keys, mask in _pieces(bounds, window):
        given = [_heads_first(x[queries]) for x in (grad_out, query)]
        given += [_heads_first(x[keys]) for x in (key, value)] + [_heads_first(out[queries])]
        if queries.stop - queries.start <= _SHORT and query.dtype != torch.float64:
            given = [x.float() for x in given]
        added = _added(mask, given[0].dtype)
        new = kernel(*given, log_sums[None, :, queries], 0.0, mask is None, attn_mask=added, scale=scale)
        _heads_first(gradients[0][queries]).copy_(new[0])
        for gradient, part in zip(gradients[1:], new[1:], strict=True):
            _heads_first(gradient[keys]).add_(part)  # under a window, pieces share keys
    return gradients


def _pieces(bounds: Tensor, window: int) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Queries, the keys that they see, and what of these each sees, or ``None`` where being causal says it all."""
    begin, *ends = bounds.tolist()
    documents = Documents([end - start for start, end in zip([begin, *ends], ends, strict=False)], window or None)
    for length in documents.lengths:
        for first_query, end, first_key in documents.pieces(length):
            mask = documents.mask(first_query, end, first_key)
            yield slice(begin + first_query, begin + end), slice(begin + first_key, begin + end), mask
        begin += length


def _heads_first(x: Tensor) -> Tensor:  # [n, heads, head size] -> [1, heads, n, head size]
    return x.transpose(0, 1)[None]


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


@cache
def works() -> bool:
    """Whether this torch's kernels, which it does not document, do what its public function does."""
    generator = torch.Generator("cpu").manual_seed(0)
    sizes, bounds = (4, 2, 2), torch.tensor([0, 5], dtype=torch.int32, device="cpu")
    given = [torch.randn(5, heads, 8, generator=generator, device="cpu").bfloat16() for heads in sizes]
    q, k, v = (x.requires_grad_() for x in given)
    try:
        with torch.enable_grad():
            own = packed_attention(q, k, v, bounds, bounds[1], 0, 0.3, 0.0)[0]
            heads_first = (_heads_first(x) for x in (q, k, v))
            stock = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=0.3, enable_gqa=True)
            outputs = own, stock[0].transpose(0, 1)
            pairs = [outputs, *zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in outputs), strict=True)]
    except (AttributeError, RuntimeError, TypeError):
        return False
    return all(torch.allclose(mine, theirs, atol=0.05, rtol=0.05) for mine, theirs in pairs)
