"""ZeRO-3 of DeepSpeed, where a rank holds only a piece of each parameter from the moment it is made."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from lightning_sft.types import InputError

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


def loading_config(strategy: Strategy | None) -> Any:
    """What lets transformers load weights into pieces, as long as it is referred to; ``None`` without ZeRO-3."""
    if not getattr(strategy, "zero_stage_3", False):
        return None
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(dict(cast(Any, strategy).config))


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """The whole parameters on every rank, for as long as the context lasts; they are not to be changed."""
    pieces = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not pieces:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(pieces)
    return context


def gathered_head(head: nn.Module) -> nn.Module | Tensor:
    """The head as it is, or, under ZeRO-3, its weight.

    A module lets go of its parameters after each of its calls, so each chunk of targets would gather the head anew, and
    its gradient would find no weight. DeepSpeed gathers a weight that another module's forward pass asks for until
    that pass is over, and again for its backward pass.

    Raises:
        InputError: Under ZeRO-3, when the head is more than a matrix.
    """
    weight = next(head.parameters())
    if not hasattr(weight, "ds_id"):
        return head
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise InputError(
            f"Under ZeRO-3 the head must be a matrix without bias; that of this model is a {type(head).__name__}. "
            "Use trainer.strategy=deepspeed_stage_2 or fsdp2."
        )
    return head.weight
