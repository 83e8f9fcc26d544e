"""Checks of batches that a user's own loader has made, before the model computes with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sft.training.trainer import datamodule_of
from lightning_sft.types import IGNORE, Batch, InputError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class OwnBatches:
    """Looks at the ids and positions of batches that are not of ``SFTDataModule``, which checks its data when it plans.

    On a CPU it looks at every batch. On other devices the host has to wait for the values, so it looks at the first
    batch of the training and of the evaluation, and at each that has longer rows than all before it.
    """

    def __init__(self) -> None:
        self._longest = {True: 0, False: 0}  # row that has been looked at, in training and in evaluation
        self._has_warned = False

    def check(self, module: LightningModule, batch: Batch, counted: bool = False) -> None:
        """Refuse a batch whose labels stand elsewhere, or that the model has no embeddings or positions for.

        One that is longer than the model's context is warned of.

        Args:
            module: The Lightning module; it may say ``num_embeddings``, ``num_positions`` and ``context_length``.
            batch: The batch, on the device.
            counted: Whether its positions are counted from the begin of each row, as nothing says where they begin.

        Raises:
            InputError: With the first id or position that the model does not have, or when most labels are the tokens
                of another place than the next, or rows begin with padding.
        """
        length, longest_seen = batch.input_ids.shape[1], self._longest[module.training]
        if batch.provenance or (batch.input_ids.device.type != "cpu" and length <= longest_seen):
            return
        self._longest[module.training] = max(longest_seen, length)
        if (size := getattr(module, "num_embeddings", None)) is not None:
            _check_ids("token id", batch.input_ids, (batch.input_ids < 0) | (batch.input_ids >= size), size)
            outside = (batch.labels < 0) | (batch.labels >= size)
            _check_ids("label", batch.labels, outside & (batch.labels != IGNORE), size)
        _check_shift(batch)
        if counted:
            _check_left(module, batch)
        longest = int(batch.position_ids.max()) + 1 if batch.position_ids.numel() else 0
        if (positions := getattr(module, "num_positions", None)) is not None and longest > positions:
            raise InputError(
                f"A batch of your loader has a sequence of {longest:,} tokens, but the model has {positions:,} "
                f"positions. Cut or leave out longer ones: with max_length={positions}, truncation=True in a tokenizer "
                "of transformers, or by SFTDataModule."
            )
        context = getattr(module, "context_length", None)
        if context is not None and longest > context and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"A batch of your loader has a sequence of {longest:,} tokens, and the model has been made for "
                f"{context:,} (max_position_embeddings in its config.json). It is trained whole; SFTDataModule would "
                "leave it out. Cut or leave out such sequences, unless you extend the context on purpose."
            )


def _check_left(module: LightningModule, batch: Batch) -> None:
    """Refuse rows that begin with padding, which positions and attention would take for tokens.

    One such token may be how the model begins a text, so there have to be two, without a label.
    """
    ids = batch.input_ids
    padding = torch.tensor(_ids_of_padding(module), dtype=ids.dtype, device=ids.device)
    begins = torch.isin(ids[:, :1], padding) & (ids[:, 1:2] == ids[:, :1]) & (batch.labels[:, :1] == IGNORE)
    rows = (begins & (ids != ids[:, :1]).any(1, keepdim=True)).flatten()
    if bool(rows.any()):
        row = int(rows.nonzero()[0])
        raise InputError(
            f"Row {row} of a batch of your loader begins with the token {int(ids[row, 0]):,} at least twice, which "
            "pads or ends rows of this model: it seems to be padded on the left, where its tokens would get wrong "
            "positions and attend to padding. Set tokenizer.padding_side = 'right'; if it is meant, give position_ids."
        )


def _ids_of_padding(module: LightningModule) -> list[int]:
    """Ids that rows are padded with: those of padding and of the end, of the model and of the data's tokenizer."""
    model, data = getattr(module, "model", None), datamodule_of(module.trainer)
    found: set[int] = set()
    for kept in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        found.update(_numbers(getattr(kept, "pad_token_id", None)), _numbers(getattr(kept, "eos_token_id", None)))
    return sorted(found.union(_numbers(getattr(getattr(data, "tokenizer", None), "pad_token_id", None))))


def _numbers(given: object) -> list[int]:
    return [number for number in (given if isinstance(given, list) else [given]) if isinstance(number, int)]


def _check_ids(kind: str, ids: Tensor, outside: Tensor, size: int) -> None:
    if not bool(outside.any()):
        return
    row, column = (int(place) for place in torch.nonzero(outside)[0])
    hint = " A label that is no target is -100." if kind == "label" else ""
    raise InputError(
        f"A batch of your loader has the {kind} {int(ids[row, column]):,} in row {row}, but the model has embeddings "
        f"for the ids 0 to {size - 1:,}.{hint} Use the tokenizer of model.pretrained; tokens that were added to it "
        "are model.new_tokens."
    )


def _check_shift(batch: Batch) -> None:
    """Refuse labels that have not been shifted, or shifted twice, as far as the tokens of the rows tell.

    Rows that repeat a token agree with several places, but none more often than the next one where labels are right.
    """
    ids, labels = batch.input_ids, batch.labels[:, :-2]
    length = labels.shape[1]
    is_target = labels != IGNORE
    of_places = [(is_target & (labels == ids[:, place : place + length])).sum() for place in range(3)]
    own, following, after, count = torch.stack([*of_places, is_target.sum()]).tolist()
    if max(own, after) <= following or 2 * max(own, after) <= count:
        return
    if own > after:
        raise InputError(
            "The labels of a batch of your loader are not shifted: they are the tokens of their own places, which the "
            "model is given. In a Batch, labels[i] is input_ids[i + 1], or -100 where that is no target; a dict of "
            "input_ids and labels is shifted here."
        )
    raise InputError(
        "The labels of a batch of your loader are shifted twice: they would be the tokens after the next ones. In a "
        "dict, labels[i] is input_ids[i], or -100 where it is no target, and they are shifted here. Where yours are "
        "shifted already, as those of a Batch are, give a lightning_sft.Batch(input_ids, labels, position_ids, "
        "target_weights)."
    )
