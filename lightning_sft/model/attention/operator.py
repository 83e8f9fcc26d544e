"""Attention of packed documents as a torch operator: one node for autograd, no graph break under torch.compile.

Kernels are registered by :mod:`lightning_sft.model.attention.cpu` and :mod:`lightning_sft.model.attention.gpu`.
"""

# No `from __future__ import annotations`: torch.library reads schemas from the annotations.
from typing import Any

import torch
from torch import Tensor


# tagged as random, so that recomputing a compiled layer in the backward pass drops the same weights
@torch.library.custom_op("lightning_sft::packed_attention", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: Tensor,
    window: int,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention within each document.

    Args:
        query: Queries of all documents end to end, ``[T, heads, head size]``, contiguous.
        key: Keys, ``[T, groups, head size]``, contiguous; the number of heads is a multiple of the number of groups.
        value: Values, ``[T, groups, head size]``, contiguous.
        bounds: Cumulative lengths of the documents, ``[D + 1]`` of int32.
        longest: Length of the longest document, a scalar on the CPU.
        window: Number of tokens that a token attends to, itself included; 0 for no limit within its document.
        scale: Factor on the scores.
        dropout: Probability of dropping an attention weight.

    Returns:
        The attention output, ``[T, heads, head size]``; the log-sum-exp of the scores, ``[heads, T]`` in float32
        (float64 for float64); and the state of the random number generator, ``[2]`` of uint64.

    Raises:
        NotImplementedError: On devices without a kernel.
    """
    raise NotImplementedError(f"packed_attention has no kernel for {query.device.type}.")


@torch.library.custom_op("lightning_sft::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sums: Tensor,
    random_state: Tensor,
    bounds: Tensor,
    longest: Tensor,
    window: int,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, given the gradient of :func:`packed_attention`'s output.

    Raises:
        NotImplementedError: On devices without a kernel.
    """
    raise NotImplementedError(f"packed_attention has no kernel for {query.device.type}.")


@packed_attention.register_fake
def _(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, heads, _size = query.shape
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    log_sums = query.new_empty(heads, num_tokens, dtype=precise)
    return query.new_empty(query.shape), log_sums, query.new_empty(2, dtype=torch.uint64)


@packed_attention_backward.register_fake
def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, bounds, longest, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, *output, bounds, longest)


def _backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients: tuple[Tensor, ...] = packed_attention_backward(grad_out, *ctx.saved_tensors, *ctx.settings)
    return (*gradients, None, None, None, None, None)


packed_attention.register_autograd(_backward, setup_context=_save)
