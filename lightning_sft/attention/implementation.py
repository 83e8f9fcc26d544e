"""Attention of packed documents under transformers' interfaces: each document goes through stock attention by itself.

So grouped heads, soft-caps, sinks, dropout and whatever else an architecture has are what they are in stock attention;
only the T × T mask is gone, and the work on its zeros.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, eager_mask, packed_sequence_mask_function, sdpa_mask

from lightning_sft.attention import halves, varlen
from lightning_sft.attention.documents import Documents

NAMES = {"sdpa": "per_document", "eager": "per_document_eager"}
"""Names of ours in transformers, by the stock attention that documents go through."""

_positions: ContextVar[Tensor | None] = ContextVar("positions", default=None)


@contextmanager
def rows_of_documents(position_ids: Tensor | None) -> Iterator[None]:
    """While it lasts, a model's rows are documents whose positions begin anew; elsewhere attention is stock attention.

    Generation, caches and padding masks are so never touched.
    """
    token = _positions.set(position_ids)
    try:
        yield
    finally:
        _positions.reset(token)


def mask(stock: str, **of_transformers: Any) -> Documents | Tensor | None:
    """What layers get as their mask: :class:`Documents` where rows hold some, else that of the stock attention."""
    make: Callable[..., Tensor | None] = sdpa_mask if stock == "sdpa" else eager_mask
    positions, length = _positions.get(), of_transformers["q_length"]
    shape = (of_transformers["batch_size"], length)
    is_usual = (
        of_transformers.get("attention_mask") is None
        and not of_transformers.get("use_vmap")
        and (of_transformers["kv_length"], of_transformers.get("q_offset", 0)) == (length, 0)
    )
    if positions is None or tuple(positions.shape) != shape or not is_usual:
        return make(**of_transformers)
    dtype = of_transformers["dtype"] if stock == "eager" else None
    sees = of_transformers["mask_function"]
    documents = Documents.found(sees, positions, of_transformers.get("local_size"), dtype)
    if documents is None:  # something else than documents in a row; they are kept apart all the same
        numbers = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)
        apart = and_masks(sees, packed_sequence_mask_function(numbers))
        return make(**of_transformers | {"mask_function": apart, "allow_is_causal_skip": False})
    if documents.lengths == [length] * shape[0] and documents.window is None:
        return make(**of_transformers)  # one a row
    return documents


def attend(
    stock: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Documents | Tensor | None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a layer, ``[B, heads, N, head size]`` to ``[B, N, heads, head size]``."""
    function: Callable[..., Any] = sdpa_attention_forward if stock == "sdpa" else eager_of(module)
    if not isinstance(attention_mask, Documents):
        result: tuple[Tensor, Tensor | None] = function(module, query, key, value, attention_mask, **settings)
        return result
    if stock == "sdpa":
        settings["is_causal"] = True
    attended: Tensor = _each(function, module, query, key, value, attention_mask, settings)
    return attended, None


def eager_of(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of the architecture that a layer is of."""
    defined = (getattr(sys.modules[kind.__module__], "eager_attention_forward", None) for kind in type(module).__mro__)
    function: Callable[..., Any] = next(found for found in defined if found is not None)
    return function


# not compiled, since lengths differ from batch to batch
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no types
def _each(
    function: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    settings: dict[str, Any],
) -> Tensor:
    num_rows = query.shape[0]
    query, key, value = map(_in_one_row, (query, key, value))
    if function is sdpa_attention_forward and settings.get("position_bias") is None:
        dropout, scale = settings.get("dropout", 0.0), settings.get("scaling") or query.shape[-1] ** -0.5
        if varlen.why_not(query, key, value, dropout) is None:
            return _in_rows(varlen.attend(query, key, value, documents, scale, dropout), num_rows)
        if halves.can(query, key, value, documents.window, dropout):
            return _in_rows(halves.attend(query, key, value, documents.lengths, scale), num_rows)
    outputs = []
    split = (x.split(documents.lengths, dim=2) for x in (query, key, value))
    for q, k, v in zip(*split, strict=True):
        for begin, end, first in documents.pieces(q.shape[2]):
            piece = q[:, :, begin:end], k[:, :, first:end], v[:, :, first:end], documents.mask(begin, end, first)
            outputs.append(function(module, *piece, **settings)[0])
    return _in_rows(torch.cat(outputs, dim=1), num_rows)


def _in_one_row(x: Tensor) -> Tensor:  # [B, heads, N, head size] -> [1, heads, B · N, head size]
    return x if x.shape[0] == 1 else x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2)


def _in_rows(x: Tensor, num_rows: int) -> Tensor:  # [1, B · N, heads, head size] -> [B, N, heads, head size]
    return x.view(num_rows, -1, *x.shape[2:])


for _stock, _name in NAMES.items():
    AttentionInterface.register(_name, partial(attend, _stock))
    AttentionMaskInterface.register(_name, partial(mask, _stock))
