"""Reference implementation: one document at a time, full logits of plain transformers, the formula in a loop.

It is independent of packing, chunking, micro-batches and normalizers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_sft.types import Example


def log_probs_alone(model: nn.Module, example: Example) -> tuple[Tensor, Tensor]:
    """Log-probability and weight of each target of a document, in float64 on the CPU, ``[T]`` each.

    Args:
        model: Model of transformers, on any device.
        example: Document to compute.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([list(map(int, example.input_ids))], device=device)  # [1, N]
    weights = torch.tensor(list(map(float, example.target_weights)), dtype=torch.float64)
    places = [i for i, weight in enumerate(weights.tolist()) if weight > 0 and i > 0]  # token i is predicted at i - 1
    logits = model(input_ids=ids, use_cache=False).logits[0, [i - 1 for i in places]].cpu().double()  # [T, V]
    return logits.log_softmax(-1)[torch.arange(len(places)), ids[0, places].cpu()], weights[places]


def gradients_alone(model: nn.Module, examples: Iterable[Example]) -> dict[str, Tensor]:
    """``−∇ Σ_t w_t · log Pr(t) / Σ_t w_t`` over all documents, by parameter name, in float64 on the CPU."""
    model.zero_grad()
    total = 0.0
    for example in examples:
        log_probs, weights = log_probs_alone(model, example)
        loss = -sum((w * p for w, p in zip(weights, log_probs, strict=True)), torch.zeros(()))
        loss.backward()
        total += float(weights.sum())
    found = {name: p.grad.cpu().double() / total for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def relative_errors(found: dict[str, Tensor], wanted: dict[str, Tensor], floor: float = 1e-2) -> dict[str, float]:
    """Relative error of each tensor, ``‖found − wanted‖ / ‖wanted‖``; at least 1 for a tensor that is only in one.

    Args:
        found: Tensors by name.
        wanted: Expected tensors by name.
        floor: Minimum denominator, as a share of the norm of all tensors together, so that rounding of large tensors
            does not count as an error of small ones.

    >>> round(relative_errors({"a": torch.tensor([1.0, 1.1])}, {"a": torch.tensor([1.0, 1.0])})["a"], 4)
    0.0707
    """
    whole = sum(float(tensor.norm()) ** 2 for tensor in wanted.values()) ** 0.5
    errors = {}
    for name in wanted.keys() | found.keys():
        shape = (wanted[name] if name in wanted else found[name]).shape
        right, own = (tensors.get(name, torch.zeros(shape, dtype=torch.float64)) for tensors in (wanted, found))
        error = float((own - right).norm()) / max(float(right.norm()), floor * whole, 1e-300)
        is_missing = bool(right.any() or own.any()) and (name not in found or name not in wanted)
        errors[name] = max(error, 1.0) if is_missing else error
    return errors
