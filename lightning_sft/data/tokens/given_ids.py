"""Target weights of rows that are token ids already, see :mod:`lightning_sft.data.rows.token_rows`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lightning_sft.objective import target_weight
from lightning_sft.types import Example, Normalize


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
