"""Attention of packed documents behind transformers' interfaces.

Where a kernel computes what the architecture's attention does, one operator (on GPUs also FlexAttention) computes all
documents; otherwise stock attention computes each document separately. Grouped heads, soft-caps, sinks, dropout and any
other feature of an architecture thus work as in stock attention; only the T × T mask, and the work on its zeros, is
gone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, eager_mask, packed_sequence_mask_function, sdpa_mask

from lightning_sft.machine.contexts import computed_in
from lightning_sft.model.attention import cpu, flex, gpu, masks
from lightning_sft.model.attention.documents import Documents, OneCall
from lightning_sft.model.attention.masks import rows_of_documents as rows_of_documents
from lightning_sft.model.attention.operator import packed_attention
from lightning_sft.model.parallel.context import Context
from lightning_sft.types import InputError

NAMES = {"sdpa": "per_document", "eager": "per_document_eager"}
"""Names of per-document attention in transformers, by the stock attention that it calls."""


class NoEagerAttentionError(Exception):
    """The module of an architecture defines no ``eager_attention_forward``."""


def mask(stock: str, **of_transformers: Any) -> Documents | Tensor | None:
    """The mask passed to layers: :class:`Documents` if rows hold several, else the mask of the stock attention."""
    make: Callable[..., Tensor | None] = sdpa_mask if stock == "sdpa" else eager_mask
    rows, length = masks.current(), of_transformers["q_length"]
    shape = (of_transformers["batch_size"], length)
    is_usual = (
        of_transformers.get("attention_mask") is None
        and not of_transformers.get("use_vmap")
        and (of_transformers["kv_length"], of_transformers.get("q_offset", 0)) == (length, 0)
    )
    if rows is None or tuple(rows.here.shape) != shape or not is_usual:
        _check_is_whole(rows)
        return make(**of_transformers)
    dtype = of_transformers["dtype"] if stock == "eager" else None
    sees = of_transformers["mask_function"]
    documents = rows.documents(sees, of_transformers.get("local_size"), dtype)
    if documents is None:  # not causal within documents, which still have to be isolated
        _check_is_whole(rows)
        apart = and_masks(sees, packed_sequence_mask_function(rows.counted()))
        return make(**of_transformers | {"mask_function": apart, "allow_is_causal_skip": False})
    if rows.context is None and documents.lengths == [length] * shape[0] and documents.widest is None:
        return make(**of_transformers)  # one document per row
    _prepare(documents, stock)
    return documents


def _check_is_whole(rows: masks.Rows | None) -> None:
    """Refuse a mask that this rank's part of the tokens cannot be computed with.

    Raises:
        InputError: When the rows are split over ranks.
    """
    if rows is not None and rows.context is not None:
        raise InputError(
            "trainer.strategy.context_parallel_size: a layer of the model attends in another way than causally within "
            "each document. Set it to 1."
        )


def _prepare(documents: Documents, stock: str) -> None:
    """Compute what layers read from documents, once for all layers and outside of compiled ones."""
    device = torch.device(documents.device)
    if stock == "sdpa" and documents.one_call is None:
        documents.one_call = one_call(device)
    elif stock == "eager" and documents.blocks is None and flex.usable(device):
        documents.blocks = flex.block_mask(documents)
    documents.prepare()


def one_call(device: torch.device) -> OneCall | None:
    """What the operator supports on a device, or ``None`` if it has no kernel."""
    if device.type == "cpu":
        return cpu.one_call()
    return gpu.one_call(device) if device.type == "cuda" else None


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
    documents = attention_mask
    if not isinstance(documents, Documents):
        function = _stock(stock, module)
        result: tuple[Tensor, Tensor | None] = function(module, query, key, value, documents, **settings)
        return result
    context = documents.context
    if context is None:
        return _of_documents(stock, module, query, key, value, documents, settings), None
    if isinstance(sinks := settings.get("s_aux"), Tensor):
        settings["s_aux"] = context.heads(sinks)
    keys = [context.repeated(states, query.shape[1]) for states in (key, value)]
    query, key, value = (context.to_heads(states) for states in (query, *keys))
    return context.to_tokens(_of_documents(stock, module, query, key, value, documents, settings)), None


def _of_documents(
    stock: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    settings: dict[str, Any],
) -> Tensor:
    """Attention of all tokens of some heads, ``[B, heads, N, head size]`` to ``[B, N, heads, head size]``."""
    scale, dropout = settings.get("scaling") or query.shape[-1] ** -0.5, settings.get("dropout", 0.0)
    takes = documents.one_call is not None and documents.one_call.takes(query, key, value, dropout)
    if stock == "sdpa" and takes and settings.get("position_bias") is None:
        dtype, window = computed_in(query), documents.window or 0
        # [B · N, heads, head size]; contiguous, so that output strides match those of the fake kernel
        tokens = (x.transpose(1, 2).flatten(0, 1).to(dtype).contiguous() for x in (query, key, value))
        out = packed_attention(*tokens, documents.bounds, documents.longest, window, scale, dropout)[0]
        joined: Tensor = out.view(query.shape[0], -1, *out.shape[1:])
        return joined
    num_rows = query.shape[0]
    query, key, value = (_in_one_row(x) for x in (query, key, value))
    if documents.blocks is not None and flex.takes(query, key, value, settings):
        more = settings.get("softcap"), settings.get("s_aux")
        whole: Tensor = flex.attend(query, key, value, documents.blocks, scale, *more)
        return _in_rows(whole, num_rows)
    return _in_rows(_each(stock, module, query, key, value, documents, settings), num_rows)


def _stock(stock: str, module: nn.Module) -> Callable[..., Any]:
    return sdpa_attention_forward if stock == "sdpa" else eager_of(module)


def eager_of(module: nn.Module) -> Callable[..., Any]:
    """The eager attention function of a layer's architecture.

    Raises:
        NoEagerAttentionError: When the architecture's module defines none.
    """
    for kind in type(module).__mro__:
        function: Callable[..., Any] | None = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise NoEagerAttentionError(f"{type(module).__name__} has no eager_attention_forward")


# not compiled, since lengths vary between batches
@torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch
def _each(
    stock: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    settings: dict[str, Any],
) -> Tensor:
    function, outputs, layer = _stock(stock, module), [], module
    if stock == "sdpa":
        settings = settings | {"is_causal": True}
    if documents.context is not None:
        layer = cast(nn.Module, _WithHeads(module, documents.context, query.shape[1] // key.shape[1]))
    split = (x.split(documents.lengths, dim=2) for x in (query, key, value))
    for q, k, v in zip(*split, strict=True):
        for begin, end, first in documents.pieces(q.shape[2]):
            piece = q[:, :, begin:end], k[:, :, first:end], v[:, :, first:end], documents.mask(begin, end, first)
            outputs.append(function(layer, *piece, **settings)[0])
    return torch.cat(outputs, dim=1)


class _WithHeads:
    """A layer of attention, of which a rank has some heads; stock attention reads what it has for each."""

    def __init__(self, module: nn.Module, context: Context, num_key_value_groups: int) -> None:
        self._module, self.num_key_value_groups = module, num_key_value_groups
        if isinstance(sinks := getattr(module, "sinks", None), Tensor):
            self.sinks = context.heads(sinks)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _in_one_row(x: Tensor) -> Tensor:  # [B, heads, N, head size] -> [1, heads, B · N, head size]
    return x if x.shape[0] == 1 else x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2)


def _in_rows(x: Tensor, num_rows: int) -> Tensor:  # [1, B · N, heads, head size] -> [B, N, heads, head size]
    return x.view(num_rows, -1, *x.shape[2:])


for _stock_name, _name in NAMES.items():
    AttentionInterface.register(_name, partial(attend, _stock_name))
    AttentionMaskInterface.register(_name, partial(mask, _stock_name))
