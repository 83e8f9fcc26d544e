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
logits are there. Only positions with a target reach the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sft.types import IGNORE, LogLikelihood

Head = nn.Module | Tensor


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

    def logits_of(states: Tensor) -> Tensor:
        logits = F.linear(states, head) if isinstance(head, Tensor) else head(states)
        return transformed(logits.to(dtype), scale, softcap)

    parameters = [head] if isinstance(head, Tensor) else list(head.parameters())
    trained = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    states = hidden[is_target] if torch.is_grad_enabled() else hidden[is_target].detach()  # [T, H]
    chunked_sum: Any = _ChunkedSum  # torch gives autograd functions no types
    total, *of_targets = chunked_sum.apply(logits_of, chunk_size, targets, w, states, *trained)
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
        logits_of: Callable[[Tensor], Tensor],
        chunk_size: int,
        targets: Tensor,
        weights: Tensor,
        states: Tensor,
        *trained: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wanted = (states.requires_grad, *(True for _ in trained))
        gradients = [
            torch.zeros_like(t) if wants else None for t, wants in zip((states, *trained), wanted, strict=True)
        ]
        log_probs, entropy = torch.empty_like(weights), torch.empty_like(weights)
        correct = torch.empty_like(targets, dtype=torch.bool)
        for start in range(0, len(targets), chunk_size):
            part = slice(start, start + chunk_size)
            target, weight = targets[part, None], weights[part, None]  # [chunk, 1]
            with torch.set_grad_enabled(any(wanted)):
                chunk = states[part].detach().requires_grad_(wanted[0])  # [chunk, H]
                logits = logits_of(chunk)  # [chunk, V]
            z = logits.detach()
            highest, most_likely = z.max(1, keepdim=True)
            correct[part] = (most_likely == target).squeeze(1)
            chosen = z.gather(1, target) - highest
            exps = (z - highest).exp_()  # its memory is that of the gradient later
            total = exps.sum(1, keepdim=True)
            log_probs[part] = (chosen - total.log()).squeeze(1)
            entropy[part] = (total.log() - _weighted_sum(z, highest, exps) / total).squeeze(1)
            if any(wanted):
                grad_logits = exps.mul_(-weight / total).scatter_add_(1, target, weight)  # w_t · (1[y_t] − softmax(z))
                inputs = [t for t, wants in zip((chunk, *trained), wanted, strict=True) if wants]
                filled = [g for g in gradients if g is not None]
                for i, new in enumerate(torch.autograd.grad(logits, inputs, grad_logits)):
                    if wanted[0] and i == 0:
                        filled[0][part] = new
                    else:
                        filled[i] += new
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(log_probs, correct, entropy)
        return weights @ log_probs, log_probs, correct, entropy

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        scaled = (None if g is None else g * grad_total.to(g.dtype) for g in ctx.saved_tensors)
        return (None, None, None, None, *scaled)


def _weighted_sum(z: Tensor, highest: Tensor, exps: Tensor) -> Tensor:
    """``Σ_v exps · (z − highest)`` of each row, where 0 · −∞ is 0; a few rows at a time, without a copy of all."""
    rows = zip(*(x.split(32) for x in (z, highest, exps)), strict=True)
    return torch.cat([(some - most).mul_(e).nansum(1, keepdim=True) for some, most, e in rows])
