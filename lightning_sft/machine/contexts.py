"""Modes of torch that are left as they were: of a module, and of what is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from transformers import PreTrainedModel

KEEP_LESS = {"ban_recompute_materialized_backward": False}
"""Settings of ``torch._functorch.config`` under which compiled layers keep less for their backward pass.

What is cheap is computed again there also if a matmul reads it: a norm's output, and the product inside an MLP. By
count, that saves a fifth of the memory of a step of Qwen2.5-0.5B and takes three hundredths more of its time.
"""


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast rounds to on a device, or ``None`` while it is off.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     autocast_dtype(torch.device("cpu"))
    torch.bfloat16
    """
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def computed_in(tensor: Tensor) -> torch.dtype:
    """Dtype that a matmul or attention of a tensor is computed in: that of autocast where it is on."""
    return autocast_dtype(tensor.device) or tensor.dtype


@contextmanager
def evaluating(module: LightningModule) -> Iterator[None]:
    """Evaluation mode without gradients, at the precision of the trainer; afterwards all modes are what they were.

    Compiled layers run as they are written: each new length of an answer would be compiled anew.

    Args:
        module: A Lightning module with a trainer.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        precision = module.trainer.precision_plugin.forward_context()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), precision:
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def in_default_dtype(model: PreTrainedModel) -> Iterator[None]:
    """A model of transformers computes in torch's default dtype, whatever its parameters are held in.

    Those held in fewer bits, as a bfloat16 base under float32 adapters, are cast while their layer runs, so that one
    layer at a time is there in both. Not for a forward pass that a backward pass follows.

    Args:
        model: With or without such parameters.
    """
    affected, stored = narrow(model), dict[nn.Parameter, Tensor]()

    def widen(_: nn.Module, __: Any, own: list[nn.Parameter]) -> None:
        for parameter in own:
            stored[parameter], parameter.data = parameter.data, parameter.data.to(torch.get_default_dtype())

    def restore(_: nn.Module, __: Any, ___: Any, own: list[nn.Parameter]) -> None:
        for parameter in own:
            parameter.data = stored.pop(parameter, parameter.data)

    hooks, claimed = [], set[nn.Parameter]()
    for module, recurse in [*((block, True) for block in blocks(model)), *((m, False) for m in model.modules())]:
        own = [p for p in module.parameters(recurse) if p in affected and p not in claimed]
        claimed |= set(own) if recurse else set()  # tied parameters are those of two modules
        if own:
            hooks.append(module.register_forward_pre_hook(partial(widen, own=own)))
            hooks.append(module.register_forward_hook(partial(restore, own=own), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of a transformers model, of which it says that they must not be split; it may not say so.

    FSDP2 gives what it has sharded a class derived from its own.
    """
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if names & {kind.__name__ for kind in type(module).__mro__}]


def narrow(model: nn.Module) -> set[nn.Parameter]:
    """The plain parameters held in fewer bits than torch's default dtype."""
    plain = (p for p in model.parameters() if type(p.data) is Tensor and p.is_floating_point())
    return {parameter for parameter in plain if parameter.element_size() < torch.get_default_dtype().itemsize}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors are of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
