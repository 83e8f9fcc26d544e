"""FlexAttention for packed documents with soft-caps or sinks, which torch's FlashAttention kernels do not support.

It is fast only when compiled, so it is used on GPUs only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from lightning_sft.machine.host_copy import without_waiting
from lightning_sft.model.attention.documents import Documents
from lightning_sft.model.recurrence import KEYWORD

_plain: Callable[..., Any] = flex_attention
_BLOCK = 128  # tokens per block of queries and of keys
_SETTINGS = {"scaling", "dropout", "softcap", "s_aux"}
"""Supported settings of an architecture's attention that change its result."""
_IGNORED = {"sliding_window", "position_ids", "is_causal", "output_attentions", "use_cache", "cache_position", KEYWORD}
"""Settings that do not change the result of eager attention given a mask."""


def usable(device: torch.device) -> bool:
    """Whether FlexAttention can be compiled for a device: an NVIDIA GPU that Triton supports."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def block_mask(documents: Documents) -> BlockMask:
    """The block mask of documents, computed on the CPU to avoid waiting for the device."""
    lengths = torch.tensor(documents.lengths, device="cpu", dtype=torch.int32)
    here = torch.arange(sum(documents.lengths), device="cpu", dtype=torch.int32)
    begins = lengths.cumsum(0, dtype=torch.int32) - lengths
    # first token that each token attends to, [T]
    first = torch.repeat_interleave(begins, lengths, output_size=len(here))
    if documents.window is not None:
        first = torch.maximum(first, here - (documents.window - 1))
    blocks = torch.arange(-(-len(here) // _BLOCK), device="cpu", dtype=torch.int32)
    first_block = first[::_BLOCK] // _BLOCK  # the first query of a block attends furthest back
    count = blocks - first_block + 1
    indices = (first_block[:, None] + blocks).clamp(max=len(blocks) - 1)  # only the first `count` of each row are read
    count, indices, seen_from = (without_waiting(x, documents.device) for x in (count, indices, first))

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= seen_from[query])

    given = count.unsqueeze(0).unsqueeze(0), indices.unsqueeze(0).unsqueeze(0)
    size = len(here), len(here)
    return BlockMask.from_kv_blocks(*given, BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=size)


def takes(query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]) -> bool:
    """Whether :func:`attend` supports these tensors and all settings of the layer's attention."""
    unknown = [n for n, given in settings.items() if given is not None and n not in _SETTINGS | _IGNORED]
    one_size = query.shape[-1] == key.shape[-1] == value.shape[-1] >= 16
    return one_size and not unknown and not settings.get("dropout") and not settings.get("output_attentions")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockMask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention within documents, ``[1, heads, T, head size]`` to ``[1, T, heads, head size]``.

    Args:
        query: Queries of all tokens, ``[1, heads, T, head size]``.
        key: Keys, ``[1, groups, T, head size]``; the number of heads is a multiple of the number of groups.
        value: Values, ``[1, groups, T, head size]``.
        blocks: Block mask made by :func:`block_mask`.
        scale: Factor on the scores.
        softcap: Soft-cap c of the scores, c · tanh(score / c).
        sinks: Score of an additional key without a value, ``[heads]``, which takes its share of each softmax.
    """

    def capped(score: Tensor, row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    options: dict[str, Any] = {"score_mod": capped, "block_mask": blocks, "scale": scale, "enable_gqa": True}
    if sinks is None:
        out: Tensor = _function()(query, key, value, **options)
    else:
        out, aux = _function()(query, key, value, **options, return_aux=AuxRequest(lse=True))
        # softmax with the sink is softmax without it, times 1 / (1 + exp(sink) / sum of exp(scores))
        share = torch.sigmoid(aux.lse - sinks.float()[None, :, None])
        out = (out * share[..., None]).to(out.dtype)
    return out.transpose(1, 2)


def _function() -> Callable[..., Any]:
    return _plain if torch.compiler.is_compiling() else _compiled()


@cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled
