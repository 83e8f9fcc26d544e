"""Stands in for the package flash-attn where it is not installed: torch ships the same FlashAttention 2 kernels.

Only what transformers calls in training is here; an argument that is missing is one that torch's kernels do not take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__version__ = "2.8.3"

_UNBOUNDED = (-1, -1)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = _UNBOUNDED,
    deterministic: bool = False,
) -> Tensor:
    """Attention within sequences laid end to end.

    Args:
        q: ``[T, heads, D]``, of all sequences.
        k: ``[T, key heads, D]``.
        v: ``[T, key heads, D]``.
        cu_seqlens_q: Where each sequence begins, and the end of the last, ``[sequences + 1]``.
        cu_seqlens_k: The same of the keys.
        max_seqlen_q: Length of the longest sequence.
        max_seqlen_k: The same of the keys.
        dropout_p: Dropout on the probabilities.
        softmax_scale: Factor on the scores.
        causal: Whether a token sees only itself and those before it.
        window_size: How many tokens it sees to the left and to the right; -1 for all.
        deterministic: Left to ``torch.use_deterministic_algorithms``.
    """
    bounds = [cu_seqlens_q.int(), cu_seqlens_k.int(), int(max_seqlen_q), int(max_seqlen_k)]
    return _attend(q, k, v, bounds, dropout_p, softmax_scale, causal, window_size)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = _UNBOUNDED,
    deterministic: bool = False,
) -> Tensor:
    """The same for rows of one length, ``[B, N, heads, D]``."""
    return _attend(q, k, v, [None, None, q.shape[1], k.shape[1]], dropout_p, softmax_scale, causal, window_size)


def flash_attn_with_kvcache(*_: Any, **__: Any) -> Tensor:
    """Not for training.

    Raises:
        NotImplementedError: Always.
    """
    raise NotImplementedError("This stand-in for flash-attn is for training: it has no attention with a cache.")


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: list[Any],
    dropout: float,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
) -> Tensor:
    windows = {}
    if tuple(window) != _UNBOUNDED:
        windows = {"window_size_left": window[0], "window_size_right": 0 if causal else window[1]}
    kernel = torch.ops.aten._flash_attention_forward
    out: Tensor = kernel(q, k, v, *bounds, dropout, causal, False, scale=scale, **windows)[0]
    return out
