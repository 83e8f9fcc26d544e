"""Attention as it is written in textbooks: one document, one head, one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_one_by_one(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None, scale: float
) -> Tensor:
    """Of ``[N, heads, head size]``: what each token sees of its own document, weighted by softmax."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    rows, begin = [], 0
    for length in lengths:
        for token in range(begin, begin + length):
            first = begin if window is None else max(begin, token - window + 1)
            keys, values = key[first : token + 1], value[first : token + 1]  # [seen, heads, head size]
            weights = (torch.einsum("hd,shd->hs", query[token], keys) * scale).softmax(-1)
            rows.append(torch.einsum("hs,shd->hd", weights, values))
        begin += length
    return torch.stack(rows)


def dense(lengths: list[int], window: int | None) -> Tensor:
    """Which token sees which, as a matrix."""
    here, number = torch.arange(sum(lengths)), torch.repeat_interleave(torch.tensor(lengths))
    distance = here[:, None] - here
    seen = (number[:, None] == number) & (distance >= 0)
    return seen if window is None else seen & (distance < window)
