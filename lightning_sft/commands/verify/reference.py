"""Reference implementation: one document at a time, full logits of plain transformers, the formula in a loop.

It is independent of packing, chunking, micro-batches and normalizers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_sft.data.batches.collate import collate
from lightning_sft.module import SFTModule
from lightning_sft.types import Example, widest


def log_probs_alone(model: nn.Module, example: Example) -> tuple[Tensor, Tensor]:
    """Log-probability and weight of each target of a document, in float64 on the CPU, ``[T]`` each.

    Args:
        model: Model of transformers, on any device.
        example: Document to compute.
    """
    logits, targets, weights, _ = _targets(model, example)
    return logits.cpu().double().log_softmax(-1)[torch.arange(len(targets)), targets.cpu()], weights


def losses_alone(model: nn.Module, example: Example, module: SFTModule) -> tuple[Tensor, Tensor]:
    """Loss and weight of each target of a document, in float64 on the CPU, ``[T]`` each, for a subclass's own loss.

    Args:
        model: Model of transformers, on the module's device.
        example: Document to compute.
        module: Configured module with a loss of its own.
    """
    logits, targets, weights, at = _targets(model, example)
    own = module.own_loss(collate([example]).to(logits.device))
    losses = own["loss"](logits.to(widest(logits.device)), targets, *(values[0, at] for values in own["loss_inputs"]))
    return losses.cpu().double(), weights


def _targets(model: nn.Module, example: Example) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Logits ``[T, V]`` and token of each target of a document, its weight in float64 on the CPU, and its position."""
    ids = torch.tensor([list(map(int, example.input_ids))], device=next(model.parameters()).device)  # [1, N]
    weights = torch.tensor(list(map(float, example.target_weights)), dtype=torch.float64)
    places = [i for i, weight in enumerate(weights.tolist()) if weight > 0 and i > 0]  # token i is predicted at i - 1
    at = [i - 1 for i in places]
    return model(input_ids=ids, use_cache=False).logits[0, at], ids[0, places], weights[places], at


def gradients_alone(
    model: nn.Module, examples: Iterable[Example], module: SFTModule | None = None
) -> dict[str, Tensor]:
    """``−∇ Σ_t w_t · log Pr(t) / Σ_t w_t`` over all documents, by parameter name, in float64 on the CPU.

    Args:
        model: Model of transformers, on any device.
        examples: Documents to compute.
        module: Module whose own loss takes the place of −log Pr; ``None`` for that.
    """
    model.zero_grad()
    total = 0.0
    for example in examples:
        if module is None:
            log_probs, weights = log_probs_alone(model, example)
            losses = -log_probs
        else:
            losses, weights = losses_alone(model, example, module)
        loss = sum((w * one for w, one in zip(weights, losses, strict=True)), torch.zeros(()))
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
