"""Context managers that set modes of torch and of modules, and restore them."""

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


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast rounds to on a device, or ``None`` while it is off.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     autocast_dtype(torch.device("cpu"))
    torch.bfloat16
    """
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def computed_in(tensor: Tensor) -> torch.dtype:
    """Dtype that a matmul or attention of a tensor is computed in: the dtype of autocast if it is on."""
    return autocast_dtype(tensor.device) or tensor.dtype


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each submodule is in the mode that it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def evaluating(module: LightningModule) -> Iterator[None]:
    """:func:`eval_mode` at the precision of the trainer.

    Compiled layers run eagerly: each new length of an answer would be compiled again.

    Args:
        module: A Lightning module with a trainer.
    """
    precision = module.trainer.precision_plugin.forward_context()
    with eval_mode(module), torch.compiler.set_stance("force_eager"), precision:
        yield


@contextmanager
def in_default_dtype(model: PreTrainedModel) -> Iterator[None]:
    """A model of transformers computes in torch's default dtype, whatever its parameters are held in.

    Those held in fewer bits, as a bfloat16 base under float32 adapters, are cast while their layer runs, so that only
    one layer at a time exists in both dtypes. Not for a forward pass that a backward pass follows.

    Args:
        model: Transformers model, with or without such parameters.
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

    FSDP2 replaces the class of a sharded module by a subclass.
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
