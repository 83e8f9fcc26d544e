"""DeepSpeed ZeRO-3, under which a rank holds only a partition of each parameter from its creation."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from lightning_sft.types import InputError


def loading_config(strategy: Any) -> Any:
    """Config that makes transformers load partitioned weights while it is referenced; ``None`` without ZeRO-3."""
    if not getattr(strategy, "zero_stage_3", False):
        return None
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(dict(strategy.config))


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Context in which parameters are gathered on every rank, for reading only."""
    pieces = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not pieces:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(pieces)
    return context


def gathered_head(head: nn.Module) -> nn.Module | Tensor:
    """The head itself or, under ZeRO-3, its weight.

    A module frees its parameters after each call, so each chunk of targets would gather the head again, and its
    backward pass would find no weight. A weight that another module's forward pass reads stays gathered until that pass
    is over, and is gathered again for its backward pass.

    Raises:
        InputError: Under ZeRO-3, when the head is not a linear layer without bias.
    """
    weight = next(head.parameters())
    if not hasattr(weight, "ds_id"):
        return head
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise InputError(
            f"Under ZeRO-3 the head must be a linear layer without bias; this model has a {type(head).__name__}. "
            "Use trainer.strategy=deepspeed_stage_2 or fsdp2."
        )
    return head.weight
