"""New special tokens: their ids in the tokenizer, their rows in the embeddings and in the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.types import InputError, widest


def resize(model: PreTrainedModel, ids: Sequence[int], num_known: int) -> None:
    """Add rows for new tokens, each initialized to the mean of the pretrained rows (Hewitt 2021).

    The matrices grow only if they have no spare rows left; spare rows that get a token start at the mean, too.

    Args:
        model: Model to resize in place.
        ids: Token ids of the new tokens; ids below ``num_known`` already have a row.
        num_known: Size of the tokenizer before the tokens were added.
    """
    size = max(ids, default=-1) + 1
    if size > _matrices(model)[0].weight.shape[0]:
        model.resize_token_embeddings(size, mean_resizing=False)
    new = [i for i in ids if i >= num_known]
    with torch.no_grad():
        for module in _matrices(model):
            for values in (module.weight, getattr(module, "bias", None)):
                if values is not None:
                    values[new] = values[:num_known].mean(0, dtype=widest(values.device)).to(values.dtype)


def train_rows(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Make the rows of these tokens separate parameters, ``new_rows``; the matrices stay as they are.

    This needs no gradient or optimizer state of the size of the vocabulary, and no other row decays.

    Args:
        model: Model to change in place.
        ids: Token ids of the rows to train.

    Raises:
        InputError: When the model does more than look up and scale a row, or embeddings or head have an adapter.
    """
    rows: dict[int, nn.Parameter] = {}
    indices = torch.tensor(sorted(ids))
    for module in _matrices(model, tied=True):
        if hasattr(module, "base_layer"):
            raise InputError(
                "model.new_tokens trains rows of the embeddings and the head, which cannot have adapters as well. "
                "Remove them from model.lora.targets."
            )
        weight, here = module.weight, indices.to(module.weight.device)
        if id(weight) not in rows:
            rows[id(weight)] = nn.Parameter(weight.detach()[here].clone())
        module.register_parameter("new_rows", rows[id(weight)])
        module.register_buffer("new_ids", here, persistent=False)
        before = None if module is model.get_output_embeddings() else module(here)
        module._of_new_rows = module.register_forward_hook(_in_head if before is None else _in_embedding)
        if before is not None and not torch.equal(module(here), before):
            raise InputError(
                f"The embeddings of {type(model).__name__} ({type(module).__name__}) are more than a lookup table, so "
                "rows of new tokens cannot be trained separately. Train the whole module: model.trained=['*embed*']."
            )


def modules(model: nn.Module) -> dict[str, Any]:
    """Embeddings and head if their rows of new tokens are trained separately, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "new_rows")}


def merge(model: nn.Module) -> None:
    """Write the rows into their matrices, and remove the separate parameters."""
    for module in modules(model).values():
        with torch.no_grad():
            module.weight[module.new_ids] = module.new_rows.to(module.weight.dtype)
        module._of_new_rows.remove()
        del module.new_rows, module.new_ids, module._of_new_rows


def _matrices(model: PreTrainedModel, tied: bool = False) -> list[Any]:
    """Embeddings and head; if they are tied, only the embeddings, unless ``tied`` asks for both."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = getattr(last, "weight", None) is first.weight
    return [first, last] if tied or not is_tied else [first]


def _in_embedding(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    is_new = args[0][..., None] == module.new_ids  # [B, N, new]
    rows = F.embedding(is_new.long().argmax(-1), module.new_rows) * getattr(module, "embed_scale", 1.0)
    return torch.where(is_new.any(-1, keepdim=True), rows.to(output.dtype), output)


def _in_head(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias[module.new_ids]
    logits = F.linear(args[0], module.new_rows.to(args[0].dtype), bias)
    return output.index_copy(-1, module.new_ids, logits.to(output.dtype))
