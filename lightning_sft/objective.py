"""The objective: the weighted log-likelihood of the target tokens.

    log Pr(y | x) = Σ_i log Pr(y_i | x, y_<i)          one optimizer step minimizes  − Σ_t w_t · log Pr(t) / Z

over every target token t of all micro-batches and all ranks of that step. `normalize` selects w_t and Z:

    token      w_t = 1                              Z = Σ w_t of the step      the mean over target tokens
    sequence   w_t = 1 / targets of its answer      Z = Σ w_t of the step      every answer counts the same
    sqrt       w_t = 1 / √(targets of its answer)   Z = Σ w_t of the step      between the two
    dataset    w_t = 1                              Z = mean Σ w_t of a step   an epoch adds up to ∇L(θ) / Z exactly

This file computes Σ_t w_t · log Pr(t) and Σ_t w_t; the division happens once, in :mod:`lightning_sft.module`. Weights
that a user gives (per message, per row) multiply w_t.

The full logits [T, V] are never materialized: they are computed in chunks of targets, and each chunk's gradient is
computed in closed form while its logits are in memory. Only positions with a target reach the head. Dtypes:

    logits, their gradient          the head's own, or autocast's
    softmax, entropy, all sums      float32
    gradients of head and states    summed in float32, multiplied by the gradient of the total (1 / Z), then rounded

With states in float64, all of it is float64. A loss other than −log Pr is a function of a few rows of logits, which
autograd differentiates while they are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sft.head.chunks import Head, automatic_chunk_size, check_chunk_size, on_chunks, scaled, slices
from lightning_sft.head.fused_softmax import fused_softmax, fuses
from lightning_sft.types import IGNORE, InputError, LogLikelihood, Normalize


@dataclass(frozen=True)
class Normalization:
    """A row of the table above.

    Args:
        weight: The weight w_t of a target, in words.
        total: The divisor Z, in words.
        meaning: What follows for the objective.
        is_planned: Whether w_t or Z depends on more than the step's own targets, so that the data module has to plan.
        is_constant: Whether Z is the same for all steps of an epoch.
    """

    weight: str
    total: str
    meaning: str
    is_planned: bool = True
    is_constant: bool = False


NORMALIZATIONS: dict[Normalize, Normalization] = {
    "token": Normalization(
        "1", "the number of target tokens of the step", "every target token has the same weight", is_planned=False
    ),
    "sequence": Normalization(
        "1 / targets of its answer", "the sum of w over the step", "every answer has the same weight"
    ),
    "sqrt": Normalization("1 / √(targets of its answer)", "the sum of w over the step", "between tokens and answers"),
    "dataset": Normalization(
        "1", "a constant, the mean of a step", "the gradients of an epoch add up to that of L(θ)", is_constant=True
    ),
}


def target_weight(normalize: Normalize, num_targets: int, weight: float = 1.0) -> float:
    """The weight w_t of each target of an answer.

    Args:
        normalize: A row of the table above.
        num_targets: Number of target tokens of the answer.
        weight: Weight of the answer in the data.

    >>> target_weight("token", 4), target_weight("sequence", 4), target_weight("sqrt", 4)
    (1.0, 0.25, 0.5)
    """
    return weight / {"sequence": num_targets, "sqrt": math.sqrt(num_targets)}.get(normalize, 1)


TargetLoss = Callable[..., Tensor]
"""Loss of each target ``[T]`` from its logits ``[T, V]``, its token ``[T]`` and further tensors ``[T, ...]``."""

_CACHED = 2**18  # logits per softmax block on a CPU: 1 MB in float32
_UNFUSED = 2**26  # the same on other devices without the fused kernel: 256 MB


def log_likelihood(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    indices: Tensor | None = None,
    loss: TargetLoss | None = None,
    loss_inputs: Sequence[Tensor] = (),
) -> LogLikelihood:
    """Weighted log-likelihood of the targets, ``Σ_t w_t · log softmax(z_t)[label_t]``, and ``Σ_t w_t``.

    With a ``loss``, the first sum is ``− Σ_t w_t · loss(z_t, label_t)``; log-probabilities and entropy are as without,
    and the loss of each target comes with them.

    Args:
        hidden: Last hidden states of the backbone, ``[..., H]``; position t predicts ``labels[t]``.
        head: The output projection: a module from H to V, or its weight ``[V, H]``.
        labels: Target token of each position, or ``IGNORE`` (-100), ``[...]``.
        weights: Weight of each target, ``[...]``; ``None`` means 1.
        scale: The logits are multiplied by this (Cohere, Granite).
        softcap: The scaled logits become ``softcap · tanh(z / softcap)`` (Gemma).
        chunk_size: Number of targets whose logits are in memory at a time; the result does not depend on it. ``None``
            means 512 on a CPU, and elsewhere a size that fits the device's memory.
        indices: Indices of the targets in the flattened ``labels``, ``[T]``, if known. Computing them synchronizes with
            the device.
        loss: Function to train on instead of −log Pr: the loss of each target ``[T]`` from logits ``[T, V]`` and tokens
            ``[T]``, called on a few targets at a time. Only the logits get a gradient.
        loss_inputs: Tensors of all positions, ``[..., *]``, that ``loss`` takes as well, at its targets.

    Returns:
        Sum and weight in float32, or float64 where the hidden states are, with each target's log-probability and
        the entropy of the prediction there.

    Raises:
        InputError: If the shapes do not match, ``chunk_size`` is not positive, or ``loss`` gives something else.

    >>> hidden, head = torch.zeros(1, 3, 8), torch.zeros(4, 8)  # all tokens equally likely
    >>> total, weight = log_likelihood(hidden, head, labels=torch.tensor([[1, -100, 3]]))
    >>> round(total.exp().item(), 4), weight.item()  # 1/4 · 1/4
    (0.0625, 2.0)
    >>> from functools import partial
    >>> smoothed = partial(torch.nn.functional.cross_entropy, label_smoothing=0.1, reduction="none")
    >>> round(log_likelihood(hidden, head, torch.tensor([[1, -100, 3]]), loss=smoothed).total.item(), 4)
    -2.7726
    """
    if hidden.shape[:-1] != labels.shape or (weights is not None and weights.shape != labels.shape):
        shapes = f"hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)}"
        raise InputError(f"hidden must be labels' shape and one more dimension, weights like labels; got {shapes}.")
    check_chunk_size(chunk_size)
    at = (labels.flatten() != IGNORE).nonzero().squeeze(1) if indices is None else indices
    targets = labels.flatten().index_select(0, at)  # [T]
    states = hidden.flatten(0, -2).index_select(0, at)  # [T, H]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    w = torch.ones_like(targets, dtype=dtype)
    if weights is not None:
        w = weights.flatten().index_select(0, at).to(dtype)

    inputs = [x.detach().flatten(0, labels.ndim - 1).index_select(0, at) for x in loss_inputs]  # [T, *] each
    of_loss = None if loss is None else (loss, inputs)
    parameters = [head] if isinstance(head, Tensor) else list(head.parameters())
    trained = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    size = chunk_size or automatic_chunk_size(head, states)
    chunked_sum: Any = _ChunkedSum  # autograd functions are untyped in torch
    found = chunked_sum.apply(head, (scale, softcap), size, of_loss, targets, w, states, *trained)
    total, log_probs, correct, entropy, *minus_losses = found
    losses = -minus_losses[0] if minus_losses else None
    return LogLikelihood(total, w.sum(), log_probs, correct, entropy, losses=losses)


def transformed(raw: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Logits from the raw output of a head: scaled, then soft-capped."""
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
        other: tuple[TargetLoss, list[Tensor]] | None,
        targets: Tensor,
        weights: Tensor,
        states: Tensor,
        *trained: Tensor,
    ) -> tuple[Tensor, ...]:
        log_probs, entropy = torch.empty_like(weights), torch.empty_like(weights)
        correct = torch.empty_like(targets, dtype=torch.bool)
        values = log_probs if other is None else torch.empty_like(weights)
        chunked = on_chunks(head, states, trained)
        # on GPUs, chunks of equal shapes reuse the same kernels
        for chunk in slices(len(targets), chunk_size, even=states.is_cpu):
            raw, gradient = chunked.forward(chunk)  # [chunk, V] each
            of_targets = (x[chunk] for x in (targets, weights, log_probs, correct, entropy))
            _softmax(raw, transformation, gradient if other is None else None, *of_targets)
            if other is not None:
                loss, inputs = other
                of_loss = (x[chunk] for x in (targets, weights, values, *inputs))
                _differentiate(loss, raw, transformation, gradient, *of_loss)
            if gradient is not None:
                chunked.backward(chunk, gradient)
            del raw, gradient  # before the next
        ctx.save_for_backward(chunked.of_states, *chunked.of_trained)
        ctx.dtypes = [tensor.dtype for tensor in (states, *trained)]
        found = log_probs, correct, entropy, *(() if other is None else (values,))
        ctx.mark_non_differentiable(*found)
        return (weights * values).sum(), *found  # as a matmul, autocast would round it

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # torch's once_differentiable would not catch this: the gradient looks constant
            raise RuntimeError(
                "log_likelihood has no second derivatives: its gradient was computed with its value. Call backward "
                "without create_graph=True."
            )
        gradients = map(scaled, ctx.saved_tensors, ctx.dtypes, [grad_total] * len(ctx.dtypes))
        return (None, None, None, None, None, None, *gradients)


def _softmax(
    raw: Tensor, transformation: tuple[float, float | None], gradient: Tensor | None, *of_targets: Tensor
) -> None:
    """Fill in the metrics and the gradient of a chunk: in one kernel, or in blocks of rows that fit a CPU's cache."""
    if fuses(raw):
        fused_softmax(raw, gradient, *of_targets, *transformation)
        return
    for rows in _blocks(raw):
        here = None if gradient is None else gradient[rows]
        _softmax_of_rows(raw[rows], transformation, here, *(x[rows] for x in of_targets))


def _blocks(raw: Tensor) -> Iterator[slice]:
    """Rows of logits ``[chunk, V]`` whose softmax is taken at a time."""
    return slices(len(raw), max(1, (_CACHED if raw.is_cpu else _UNFUSED) // raw.shape[1]), even=True)


def _differentiate(
    loss: TargetLoss,
    raw: Tensor,
    transformation: tuple[float, float | None],
    gradient: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    values: Tensor,
    *inputs: Tensor,
) -> None:
    """Fill in minus the loss of each target of a chunk and the gradient of the weighted sum, by autograd."""
    for rows in _blocks(raw):
        target, weight, *others = (x[rows] for x in (targets, weights, *inputs))
        z = raw[rows].detach().to(weight.dtype).requires_grad_(gradient is not None)
        with torch.set_grad_enabled(gradient is not None):
            logits = transformed(z, *transformation)
            losses = loss(logits.clone() if logits is z else logits, target, *others)  # which may change them in place
        if losses.shape != target.shape or losses.requires_grad != z.requires_grad:
            given = f"{tuple(losses.shape)}{'' if losses.requires_grad else ' without a gradient'}"
            raise InputError(
                f"The loss must be one number for each target, [{len(target)}], computed from the logits; got {given}. "
                'Leave reductions out, as with reduction="none".'
            )
        values[rows] = -losses.detach()
        if gradient is not None:
            gradient[rows] = torch.autograd.grad(losses, z, -weight.to(losses.dtype))[0]


def _softmax_of_rows(
    raw: Tensor,
    transformation: tuple[float, float | None],
    gradient: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    log_probs: Tensor,
    correct: Tensor,
    entropy: Tensor,
) -> None:
    """Fill in the metrics of some rows of raw logits, and the gradient of the weighted sum with respect to them."""
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
