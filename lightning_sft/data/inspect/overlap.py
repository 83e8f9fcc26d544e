"""Whether validation data are training data, looked at cheaply enough for every fit."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from lightning_sft.data.tokens.dataset import Split
from lightning_sft.data.tokens.examples import Examples

_LOOKED_UP = 200  # sequences of the validation, evenly spaced
_COMPARED = 20_000  # sequences of the training, of which each takes some microseconds
_SHARE = 0.1  # of the sequences looked up: a few short ones are the same in honest data, too


def overlap(splits: Mapping[str, Split]) -> str:
    """A remark where the validation has many sequences of the training, or else nothing.

    A sample of the validation is compared with the training sequences that have as many tokens and targets; where those
    are too many, with a sample of them. ``show --check`` compares all.

    Args:
        splits: Splits by name.
    """
    if not {"train", "val"} <= splits.keys():
        return ""
    train, val = splits["train"].examples, splits["val"].examples
    chosen = _spaced(np.arange(len(val)), _LOOKED_UP)
    wanted = _shapes(val)[chosen]
    candidates = np.flatnonzero(np.isin(_shapes(train), wanted))
    compared = _spaced(candidates, _COMPARED)
    seen = {train.ids(int(i)) for i in compared}
    count = sum(val.ids(int(i)) in seen for i in chosen)
    if count < _SHARE * len(chosen):
        return ""
    share, least = count / len(chosen), " at least" if len(compared) < len(candidates) else ""
    return (
        f"val: {share:.0%}{least} of its sequences are also in the training, so val/loss says little of unseen data. "
        "Hold data out, as data.val=5% does; lightning-sft show --check names the rows."
    )


def _shapes(examples: Examples) -> NDArray[np.int64]:
    """The numbers of tokens and targets of each sequence, as one number."""
    return (examples.lengths << 32) + examples.num_targets


def _spaced(indices: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    return indices if len(indices) <= most else indices[np.linspace(0, len(indices) - 1, most).astype(int)]
