"""Ids and target weights of rows that are token ids already, see :mod:`lightning_sft.data.rows.token_rows`."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_sft.objective import target_weight
from lightning_sft.types import Example, InputError, Normalize


def weighted(example: Example, normalize: Normalize, weight: float) -> Example:
    """An example with its target weights for a normalization: each stretch of targets is an answer.

    Args:
        example: Example with weights of its row alone.
        normalize: Normalization, see :mod:`lightning_sft.objective`.
        weight: Multiplies the weight of each target.

    >>> weighted(Example([5, 6, 7, 8], [0.0, 1.0, 0.0, 1.0]), "sequence", 2.0).target_weights.tolist()
    [0.0, 2.0, 0.0, 2.0]
    """
    weights = np.array(example.target_weights, np.float64)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], weights > 0, [False]])))
    for begin, end in edges.reshape(-1, 2):
        weights[begin:end] *= target_weight(normalize, int(end - begin), weight)
    return replace(example, target_weights=weights)


def check_ids(example: Example, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the ids of a row are ids of the tokenizer.

    Args:
        example: The row.
        tokenizer: The tokenizer.

    Raises:
        InputError: When one is not.
    """
    largest, end = int(np.max(example.input_ids)), _num_ids(tokenizer, len(tokenizer))
    if largest >= end:
        raise InputError(
            f"{example.provenance}: 'input_ids' has the id {largest:,}, but those of the tokenizer are from 0 to "
            f"{end - 1:,}. Correct it, or give the tokenizer that the ids are of: data.tokenizer."
        )


@lru_cache(maxsize=8)
def _num_ids(tokenizer: PreTrainedTokenizerBase, length: int) -> int:
    """One more than the largest id; a vocabulary may have gaps, and grow."""
    return max(length, 1 + max(tokenizer.get_vocab().values(), default=-1))
