"""The forward pass of every step: the model without its head, from token ids to hidden states."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.model.attention.per_document import rows_of_documents
from lightning_sft.types import InputError


def backbone_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The model without its head, and the head from H to V.

    Raises:
        InputError: When the architecture does not keep them apart.
    """
    backbone, head = model.base_model, model.get_output_embeddings()
    if backbone is model or not isinstance(head, nn.Module):
        raise InputError(f"{type(model).__name__} has no separate backbone and output head; it cannot be trained here.")
    return backbone, head


def hidden_states(
    backbone: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None, spans: tuple[int, ...] = ()
) -> Tensor:
    """Last hidden states ``[B, N, H]``. No attention mask and no cache: so transformers finds packed documents.

    Args:
        backbone: The model without its head.
        input_ids: ``[B, N]``.
        position_ids: Position of each token in its document, ``[B, N]``; ``None`` where each row is one.
        spans: Lengths of all documents in row-major order, padding included; without them the device is waited for.
    """
    positions = {} if position_ids is None else {"position_ids": position_ids}
    with rows_of_documents(position_ids, spans):
        hidden: Tensor = backbone(input_ids=input_ids, use_cache=False, **positions).last_hidden_state
    return hidden
