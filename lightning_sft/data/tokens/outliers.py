"""Sequences so much longer than all others that they decide what a micro-batch takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

_TIMES = 4  # as long as any other
_SHARE = 100  # of so many sequences, one may be an outlier
_FEW = 20  # sequences of which none is


def outliers(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of the sequences that are several times as long as any other, the longest first.

    Args:
        lengths: Tokens of each sequence.

    >>> outliers([100] * 50 + [7000] + [131] * 50).tolist()
    [50]
    """
    lengths = np.asarray(lengths)
    if len(lengths) < _FEW:
        return np.zeros(0, np.int64)
    order = np.argsort(-lengths, kind="stable")[: len(lengths) // _SHARE + 2]
    falls = np.flatnonzero(lengths[order[:-1]] > _TIMES * lengths[order[1:]])
    return order[: falls[-1] + 1] if len(falls) else order[:0]


def outlier_remark(lengths: Sequence[int] | NDArray[np.int64], place: Callable[[int], str]) -> str | None:
    """What there is to say of outliers: where they are, and how memory is saved; ``None`` where there are none.

    Args:
        lengths: Tokens of each sequence.
        place: Gives the location of a sequence from its index.

    >>> outlier_remark([100] * 50 + [7000], lambda index: f"row {index + 1}").split(":")[0]
    '1 of 51 sequences is far longer than the others, which have at most 100 tokens'
    """
    if not len(found := outliers(lengths)):
        return None
    others, first = int(np.delete(np.asarray(lengths), found).max()), int(found[0])
    return (
        f"{len(found)} of {len(lengths):,} sequences {'is' if len(found) == 1 else 'are'} far longer than the others, "
        f"which have at most {others:,} tokens: {place(first)} has {int(lengths[first]):,}. Every micro-batch has room "
        f"for it, which takes memory. data.max_length={others} leaves it out, and data.overflow=truncate cuts it."
    )
