"""The forward pass of every step: the model without its head, from token ids to hidden states."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.model.attention.per_document import rows_of_documents
from lightning_sft.types import InputError


def backbone_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The model without its head, and the head, which maps H features to V logits.

    Raises:
        InputError: When the architecture does not separate the two.
    """
    backbone, head = model.base_model, model.get_output_embeddings()
    if backbone is model or not isinstance(head, nn.Module):
        raise InputError(
            f"{type(model).__name__} has no separate backbone and output head, so it cannot be trained here."
        )
    return backbone, head


def hidden_states(
    backbone: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None, spans: tuple[int, ...] = ()
) -> Tensor:
    """Last hidden states ``[B, N, H]``, without attention mask and cache so that transformers finds packed documents.

    Args:
        backbone: The model without its head.
        input_ids: Token ids, ``[B, N]``.
        position_ids: Position of each token in its document, ``[B, N]``; ``None`` if each row is one document.
        spans: Lengths of all documents in row-major order, padding included; ``()`` waits for the device.
    """
    positions = {} if position_ids is None else {"position_ids": position_ids}
    with rows_of_documents(position_ids, spans):
        hidden: Tensor = backbone(input_ids=input_ids, use_cache=False, **positions).last_hidden_state
    return hidden
