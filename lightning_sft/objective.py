"""The objective: the weighted log-likelihood of the target tokens.

    log Pr(y | x) = Σ_i log Pr(y_i | x, y_<i)          one optimiser step minimises  − Σ_t w_t · log Pr(t) / Z

over every target token t of all micro-batches and all ranks of that step. `normalize` says what w_t and Z are:

    token      w_t = 1                              Z = Σ w_t of the step      the mean over target tokens
    sequence   w_t = 1 / targets of its answer      Z = Σ w_t of the step      every answer counts the same
    sqrt       w_t = 1 / √(targets of its answer)   Z = Σ w_t of the step      between the two
    dataset    w_t = 1                              Z = mean Σ w_t of a step   an epoch adds up to ∇L(θ) / Z exactly

This file computes Σ_t w_t · log Pr(t) and Σ_t w_t; the division happens once, in :mod:`lightning_sft.module`. Weights
that a user gives (per message, per row) multiply w_t.

The logits are never held: [T, V] is worked through in chunks of targets, and each chunk's gradient is taken while its
logits are there. Of a chunk, what the head gives and its gradient are held in the head's own precision; the softmax is
taken in float32, in blocks of rows that a processor's cache holds. Only positions with a target reach the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sft.types import IGNORE, LogLikelihood

Head = nn.Module | Tensor

_BLOCK = 2**18  # logits that a CPU takes the softmax of at a time: 1 MB in float32


def log_likelihood(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int = 512,
) -> LogLikelihood:
    """Weighted log-likelihood of the targets, ``Σ_t w_t · log softmax(z_t)[label_t]``, and ``Σ_t w_t``.

    Args:
        hidden: Last hidden states of the backbone, ``[..., H]``; position t predicts ``labels[t]``.
        head: The output projection: a module from H to V, or its weight ``[V, H]``.
        labels: Target token of each position, or ``IGNORE`` (-100), ``[...]``.
        weights: Weight of each target, ``[...]``; ``None`` means 1.
        scale: The logits are multiplied by this (Cohere, Granite).
        softcap: The scaled logits become ``softcap · tanh(z / softcap)`` (Gemma).
        chunk_size: How many targets have their logits in memory at a time; the result does not depend on it.

    Returns:
        Sum and weight in float32, or float64 where the hidden states are, with each target's log-probability and
        the entropy of the prediction there.

    Raises:
        ValueError: When the shapes do not fit, or ``chunk_size`` is not positive.

    >>> hidden, head = torch.zeros(1, 3, 8), torch.zeros(4, 8)  # all tokens equally likely
    >>> total, weight = log_likelihood(hidden, head, labels=torch.tensor([[1, -100, 3]]))
    >>> round(total.exp().item(), 4), weight.item()  # 1/4 · 1/4
    (0.0625, 2.0)
    """
    if hidden.shape[:-1] != labels.shape or (weights is not None and weights.shape != labels.shape):
        shapes = f"hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)}"
        raise ValueError(f"hidden must be labels' shape and one more dimension, weights like labels; got {shapes}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    is_target = labels != IGNORE
    targets = labels[is_target]  # [T]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    w = torch.ones_like(targets, dtype=dtype) if weights is None else weights[is_target].to(dtype)

    parameters = [head] if isinstance(head, Tensor) else list(head.parameters())
    trained = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    states = hidden[is_target] if torch.is_grad_enabled() else hidden[is_target].detach()  # [T, H]
    chunked_sum: Any = _ChunkedSum  # torch gives autograd functions no types
    total, *of_targets = chunked_sum.apply(head, (scale, softcap), chunk_size, targets, w, states, *trained)
    return LogLikelihood(total, w.sum(), *of_targets)


def transformed(raw: Tensor, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """What a head gives as logits: scaled, then soft-capped."""
    logits = raw if scale == 1 else raw * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _ChunkedSum(torch.autograd.Function):
    """``Σ_t w_t · log Pr(t)`` over chunks; the sum is a scalar, so its gradients are known up to a factor at once."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        transformation: tuple[float, float | None],
        chunk_size: int,
        targets: Tensor,
        weights: Tensor,
        states: Tensor,
        *trained: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        of_states = torch.zeros_like(states) if states.requires_grad else None
        of_trained = [] if len(targets) else [torch.zeros_like(t) for t in trained]
        log_probs, entropy = torch.empty_like(weights), torch.empty_like(weights)
        correct = torch.empty_like(targets, dtype=torch.bool)
        for chunk in _even(len(targets), chunk_size):
            some = states[chunk].detach().requires_grad_(states.requires_grad)  # [chunk, H]
            inputs = [*([some] if states.requires_grad else []), *trained]
            with torch.set_grad_enabled(bool(inputs)):
                raw = F.linear(some, head) if isinstance(head, Tensor) else head(some)  # [chunk, V]
            gradient = torch.empty_like(raw) if inputs else None
            parts = [x[chunk] for x in (targets, weights, log_probs, correct, entropy)]
            for rows in _even(len(raw), max(1, _BLOCK // raw.shape[1]) if raw.device.type == "cpu" else len(raw)):
                here = None if gradient is None else gradient[rows]
                _softmax(raw.detach()[rows], transformation, here, *(x[rows] for x in parts))
            if inputs:
                new = list(torch.autograd.grad(raw, inputs, gradient))
                if of_states is not None:
                    of_states[chunk] = new.pop(0)
                of_trained = [old.add_(more) for old, more in zip(of_trained, new, strict=True)] if of_trained else new
        ctx.save_for_backward(of_states, *of_trained)
        ctx.mark_non_differentiable(log_probs, correct, entropy)
        return weights @ log_probs, log_probs, correct, entropy

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        scaled = (None if g is None else g * grad_total.to(g.dtype) for g in ctx.saved_tensors)
        return (None, None, None, None, None, *scaled)


def _softmax(
    raw: Tensor,
    transformation: tuple[float, float | None],
    gradient: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    log_probs: Tensor,
    correct: Tensor,
    entropy: Tensor,
) -> None:
    """Fill in the figures of some rows of what the head gives, and the gradient of the sum with respect to these."""
    target, weight, (scale, softcap) = targets[:, None], weights[:, None], transformation
    z = transformed(raw.to(weight.dtype), scale, softcap)
    highest, most_likely = z.max(1, keepdim=True)
    below = z - highest
    chosen, exps = below.gather(1, target), below.exp()
    total = exps.sum(1, keepdim=True)
    torch.sub(chosen, total.log(), out=log_probs[:, None])
    torch.eq(most_likely, target, out=correct[:, None])
    torch.sub(total.log(), below.mul_(exps).nansum(1, keepdim=True) / total, out=entropy[:, None])  # 0 · −∞ is 0
    if gradient is not None:
        of_z = exps.mul_(-weight / total).scatter_add_(1, target, weight)  # w_t · (1[y_t] − softmax(z))
        if softcap is not None:
            of_z.mul_(1 - (z / softcap) ** 2)  # tanh' = 1 − tanh²
        gradient.copy_(of_z if scale == 1 else of_z.mul_(scale))


def _even(total: int, most: int) -> Iterator[slice]:
    """Slices of at most ``most``, as even as can be, that make up ``range(total)``."""
    num = -(-total // most)
    for i in range(num):
        yield slice(-(-total * i // num), -(-total * (i + 1) // num))
