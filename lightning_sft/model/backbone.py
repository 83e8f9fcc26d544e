"""The forward pass of every step: the model without its head, from token ids to hidden states."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.model import recurrence
from lightning_sft.model.attention.per_document import rows_of_documents
from lightning_sft.model.parallel.context import Context
from lightning_sft.model.pretrained import is_composite
from lightning_sft.types import InputError


def backbone_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The model without its head, and the head, which maps H features to V logits.

    Raises:
        InputError: When the architecture does not separate the two.
    """
    backbone, head = model.get_decoder() if is_composite(model) else model.base_model, model.get_output_embeddings()
    if getattr(backbone, "lm_head", None) is not None:  # Llama 4's decoder has the head inside
        backbone = getattr(backbone, "model", model)
    if backbone is model or not isinstance(head, nn.Module):
        raise InputError(
            f"{type(model).__name__} has no separate backbone and output head, so it cannot be trained here."
        )
    return backbone, head


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The innermost model whose forward pass gives logits: the model itself, but for Llama 4.

    Llama 4 has a causal language model inside, and its own forward pass fails on text in transformers 5.24.
    """
    inner = getattr(model, "language_model", None)
    return inner if isinstance(inner, PreTrainedModel) and hasattr(inner, "lm_head") else model


def hidden_states(
    backbone: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    spans: tuple[int, ...] = (),
    context: Context | None = None,
    lengths: tuple[int, ...] = (),
) -> Tensor:
    """Last hidden states ``[B, N, H]``, without attention mask and cache so that transformers finds packed documents.

    Args:
        backbone: The model without its head.
        input_ids: Token ids, ``[B, N]``.
        position_ids: Position of each token in its document, ``[B, N]``; ``None`` if each row is one document.
        spans: Lengths of all documents in row-major order, padding included; ``()`` waits for the device.
        context: Ranks that the tokens are split over; the result is this rank's part, ``[B, ⌈N / C⌉, H]``.
        lengths: Tokens of each document without its padding; ``()`` where nobody has counted them.
    """
    with rows_of_documents(position_ids, spans, context, lengths) as rows:
        arguments: dict[str, Any] = recurrence.arguments(backbone)
        if rows is not None and takes_positions(backbone):
            arguments["position_ids"] = rows.here
        if context is not None:
            input_ids = context.part(input_ids)
        hidden: Tensor = backbone(input_ids=input_ids, use_cache=False, **arguments).last_hidden_state
    return hidden


def takes_positions(backbone: nn.Module) -> bool:
    """Whether a backbone accepts ``position_ids``."""
    return "position_ids" in inspect.signature(backbone.forward).parameters


def can_be_packed(backbone: nn.Module) -> bool:
    """Whether a backbone can be told where the documents of a row begin."""
    return takes_positions(backbone) or recurrence.is_separated(backbone)
