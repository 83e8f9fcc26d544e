"""Parameters that a step gives no gradient: DDP averages gradients only once it has those of all parameters.

It would leave them as they are on each rank, and raise an error one step later. Such are the biases by which some
routers are balanced outside of the gradient, or layers that select which tokens to attend to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_sft.io.words import counted
from lightning_sft.machine.contexts import eval_mode
from lightning_sft.model.backbone import hidden_states
from lightning_sft.training.hooks import is_ours
from lightning_sft.training.optimizers import parameters_of
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def expect_unused(strategy: Strategy | None, backbone: nn.Module, head: nn.Module) -> None:
    """Let DDP look for parameters without a gradient in each step, if the logits of a few tokens do not reach all.

    Args:
        strategy: Strategy of the trainer, before it wraps the model.
        backbone: The model without its head.
        head: The head, from hidden states to logits.
    """
    if not _waits_for_all(strategy):
        return
    if names := unused(backbone, head):
        strategy._ddp_kwargs["find_unused_parameters"] = True
        parameters = counted(len(names), "parameter")
        rank_zero_info(f"Text gives {parameters} no gradient, such as {names[0]}; DDP looks for them.")


def check_gradients(trainer: Trainer, module: LightningModule) -> None:
    """Refuse a step for which DDP has averaged no gradients; warn of gradients that have no optimizer.

    The latter are looked for in the first step of an epoch: what was frozen may have been unfrozen in between.

    Args:
        trainer: Lightning trainer, before the step.
        module: The module.

    Raises:
        InputError: When a trained parameter has no gradient under DDP.
    """
    check_all_reduced(trainer.strategy, module)
    is_first = trainer.fit_loop.epoch_loop.batch_idx < trainer.accumulate_grad_batches
    if is_first and is_ours(type(module).configure_optimizers):  # a user's own may leave some out on purpose
        _warn_of_untrained(trainer, module)


def check_all_reduced(strategy: Strategy, module: nn.Module) -> None:
    """Refuse a step in which DDP has waited in vain for the gradient of a parameter, and averaged none.

    Raises:
        InputError: When a trained parameter has no gradient.
    """
    if not _waits_for_all(strategy) or strategy.world_size == 1:
        return
    names = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    if names:
        raise InputError(
            f"{len(names)} trained parameters have got no gradient, such as {names[0]}, so DDP has not averaged "
            "gradients over the ranks. Set trainer.strategy=ddp_find_unused_parameters_true, or name them in "
            "model.frozen."
        )


def _warn_of_untrained(trainer: Trainer, module: nn.Module) -> None:
    known = {id(parameter) for optimizer in trainer.optimizers for parameter in parameters_of(optimizer)}
    names = [name for name, p in module.named_parameters() if p.grad is not None and id(p) not in known]
    if names and not trainer.strategy.handles_gradient_accumulation:  # DeepSpeed has parameters of its own
        rank_zero_warn(
            f"{len(names):,} parameters have a gradient but no optimizer, such as {names[0]}: they do not change. They "
            "were frozen when the optimizer was made. Train them from the start (model.frozen, model.trained), or in "
            "another fit from a checkpoint."
        )


def unused(backbone: nn.Module, head: nn.Module) -> list[str]:
    """Names of the trained parameters of a model that the logits of a few tokens, or of one, do not depend on.

    A rank that takes part in a step without data computes one token, from which no recurrent state decays.
    """
    tokens = torch.arange(8, device=next(head.parameters()).device)[None]
    with eval_mode(backbone), torch.enable_grad():
        few, one = (_parameters_of(head(hidden_states(backbone, ids))) for ids in (tokens, tokens[:, :1]))
    reached = few & one
    named = [*backbone.named_parameters(), *head.named_parameters()]
    return [name for name, parameter in named if parameter.requires_grad and id(parameter) not in reached]


def _parameters_of(output: Tensor) -> set[int]:
    """Ids of the parameters in the graph of a tensor."""
    nodes: list[Any] = [output.grad_fn]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [inner for inner, _ in node.next_functions]
    return {id(node.variable) for node in seen if hasattr(node, "variable")}


def _waits_for_all(strategy: Strategy | None) -> TypeGuard[DDPStrategy]:
    """Whether a strategy averages gradients by DDP, and only those of all parameters; DeepSpeed does it by itself."""
    if not isinstance(strategy, DDPStrategy) or strategy.handles_gradient_accumulation:
        return False
    return not any(strategy._ddp_kwargs.get(name) for name in ("find_unused_parameters", "static_graph"))
