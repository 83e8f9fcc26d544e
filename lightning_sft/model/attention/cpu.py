"""Attention of packed documents on a CPU, by torch's kernels.

All documents are one node of the graph, so nothing is sliced and concatenated for each. For half precision torch has
two backward kernels, and the float32 one is faster for short documents (twice as fast at 128 tokens, on two cores with
AMX), so these use it; it is more exact as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from lightning_sft.model.attention.documents import Documents, OneCall
from lightning_sft.model.attention.operator import packed_attention, packed_attention_backward

_SHORT = 320  # document length in tokens up to which the backward pass is faster in float32


@cache
def one_call() -> OneCall | None:
    """What the operator supports on CPUs: all but dropout; ``None`` if torch's kernels fail their check."""
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
    """See :func:`~lightning_sft.model.attention.operator.packed_attention`."""
    assert not dropout, "torch's CPU kernels have no dropout"
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty(query.shape)
    log_sums = query.new_empty(query.shape[:2], dtype=precise).T  # tokens first, as in the kernels' layout
    q, k, v, o = map(_heads_first, (query, key, value, out))
    for queries, keys, mask in _pieces(bounds, window):
        piece = q.narrow(2, *queries), k.narrow(2, *keys), v.narrow(2, *keys)
        attended, log_sum = kernel(*piece, 0.0, mask is None, attn_mask=_added(mask, q.dtype), scale=scale)
        o.narrow(2, *queries).copy_(attended)
        log_sums.narrow(1, *queries).copy_(log_sum[0])
    return out, log_sums.contiguous(), torch.zeros(2, dtype=torch.uint64, device="cpu")


@packed_attention_backward.register_kernel("cpu")
def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, random_state: Tensor,
    bounds: Tensor, longest: Tensor, window: int, scale: float, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`~lightning_sft.model.attention.operator.packed_attention_backward`."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    make = torch.zeros_like if window else torch.empty_like  # with a window, pieces share keys
    gradients = torch.empty_like(query), make(key), make(value)
    into_q, into_k, into_v = map(_heads_first, gradients)
    g, q, k, v, o = map(_heads_first, (grad_out, query, key, value, out))
    log_sums = log_sums.T.contiguous().T[None]
    for queries, keys, mask in _pieces(bounds, window):
        given = [x.narrow(2, *where) for x, where in ((g, queries), (q, queries), (k, keys), (v, keys), (o, queries))]
        if queries[1] <= _SHORT and query.dtype != torch.float64:
            given = [x.float() for x in given]
        options = {"attn_mask": _added(mask, given[0].dtype), "scale": scale}
        of_q, of_k, of_v = kernel(*given, log_sums.narrow(2, *queries), 0.0, mask is None, **options)
        into_q.narrow(2, *queries).copy_(of_q)
        for into, part in ((into_k, of_k), (into_v, of_v)):
            if window:
                into.narrow(2, *keys).add_(part)
            else:
                into.narrow(2, *keys).copy_(part)
    return gradients


def _pieces(bounds: Tensor, window: int) -> Iterator[tuple[tuple[int, int], tuple[int, int], Tensor | None]]:
    """Pieces to compute: (start, count) of the queries, (start, count) of the keys they attend to, and their mask.

    The mask is ``None`` if it is plainly causal.
    """
    begin, *ends = bounds.tolist()
    documents = Documents([end - start for start, end in zip([begin, *ends], ends, strict=False)], window or None)
    for length in documents.lengths:
        for first_query, end, first_key in documents.pieces(length):
            queries, keys = (begin + first_query, end - first_query), (begin + first_key, end - first_key)
            yield queries, keys, documents.mask(first_query, end, first_key)
        begin += length


def _heads_first(x: Tensor) -> Tensor:  # [n, heads, head size] -> [1, heads, n, head size]
    return x.transpose(0, 1)[None]


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


@cache
def works() -> bool:
    """Whether the kernels of this torch, which are not documented, agree with its public function."""
    generator = torch.Generator("cpu").manual_seed(0)
    sizes, bounds = (4, 2, 2), torch.tensor([0, 5], dtype=torch.int32, device="cpu")
    given = [torch.randn(5, heads, 8, generator=generator, device="cpu").bfloat16() for heads in sizes]
    q, k, v = (x.requires_grad_() for x in given)
    try:
        # with hooks of its own, so that gradient checkpointing does not count what is saved here
        with torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
            own = packed_attention(q, k, v, bounds, bounds[1], 0, 0.3, 0.0)[0]
            heads_first = _heads_first(q), _heads_first(k), _heads_first(v)
            stock: Tensor = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=0.3, enable_gqa=True)
            outputs = own, stock[0].transpose(0, 1)
            pairs = [outputs, *zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in outputs), strict=True)]
    except (AttributeError, RuntimeError, TypeError):
        return False
    return all(torch.allclose(mine, theirs, atol=0.05, rtol=0.05) for mine, theirs in pairs)
