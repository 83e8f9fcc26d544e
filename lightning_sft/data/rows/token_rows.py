"""Rows that are token ids already, with labels or masks, as examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_sft.data.rows.values import check_weight, shown
from lightning_sft.types import IGNORE, Example, InputError

_LARGEST = 2**31 - 1  # ids are int32


def read_tokens(
    input_ids: Any, targets: Mapping[str, Any], optional: Mapping[str, Any], weight: float, provenance: str
) -> Example:
    """A row of token ids as a training sequence.

    Padding at its ends is cut off. The first token has no context, so it is no target.

    Args:
        input_ids: Token ids of one document, length N.
        targets: Labels (the id, or -100) and masks (0, 1 or a weight), each of length N; all of them have to agree.
        optional: An ``attention_mask``, 0 at padding, and ``position_ids``, which have to be 0 to N - 1.
        weight: Weight of each target token, times that of a mask.
        provenance: Location of the row.

    Raises:
        InputError: When these are no ids, not of one length, or nothing is to be trained.

    >>> read_tokens([5, 6, 7], {"labels": [-100, -100, 7]}, {}, 1.0, "a.jsonl:1").target_weights.tolist()
    [0.0, 0.0, 1.0]
    """
    ids = _numbers(input_ids, "'input_ids'", len(input_ids) if isinstance(input_ids, Sequence) else 0)
    if len(ids) == 0 or ids.min() < 0 or ids.max() > _LARGEST or (ids % 1).any():
        raise InputError(f"'input_ids' must be a list of token ids, integers from 0, got {shown(input_ids)}.")
    weights = np.full(len(ids), weight)
    for key, values in targets.items():
        own = _numbers(values, repr(key), len(ids))
        if key == "labels":
            is_target = own != IGNORE
            if (wrong := np.flatnonzero(is_target & (own != ids))).size:
                raise InputError(
                    f"'labels' must have {IGNORE} or the id of 'input_ids' at the same place (they are shifted later); "
                    f"at {wrong[0]} they have {own[wrong[0]]:.15g} where the id is {ids[wrong[0]]:.15g}."
                )
            own = is_target.astype(float)
        elif own.min() < 0:
            raise InputError(f"{key!r} must have 0, 1 or a positive weight for each id, got {own.min():g}.")
        weights *= own
    begin, end = _without_padding(optional.get("attention_mask"), len(ids))
    positions = optional.get("position_ids")
    if positions is not None and _numbers(positions, "'position_ids'", len(ids))[begin:end].tolist() != list(
        range(end - begin)
    ):
        raise InputError("'position_ids' do not count from 0: the row holds several documents. Write a row for each.")
    if weights[:begin].any() or weights[end:].any():
        raise InputError("'attention_mask' is 0 at a token that is to be trained. Correct one of them.")
    weights = weights[begin:end]
    weights[0] = 0.0
    for own in np.unique(weights):
        check_weight(own, "the weight of a token times that of the row")
    if not weights.any():
        raise InputError("no token of the row is to be trained: all labels are -100, or the mask is 0. Remove the row.")
    return Example(ids[begin:end].astype(np.int32), weights, provenance)


def _numbers(values: Any, what: str, length: int) -> NDArray[np.float64]:
    """Finite numbers, one for each id."""
    is_list = isinstance(values, (list, tuple)) and all(isinstance(value, (int, float)) for value in values)
    try:
        numbers = np.array(values if is_list else [math.nan], np.float64)
    except OverflowError:  # an integer of hundreds of digits
        numbers = np.array([math.nan])
    if not np.isfinite(numbers).all():
        raise InputError(f"{what} must be a list of numbers, got {shown(values)}.")
    if len(numbers) != length:
        raise InputError(f"{what} has {len(numbers)} values for {length} ids of 'input_ids'.")
    return numbers


def _without_padding(mask: Any, length: int) -> tuple[int, int]:
    """Where the document begins and ends."""
    if mask is None:
        return 0, length
    here = np.flatnonzero(_numbers(mask, "'attention_mask'", length))
    if not len(here) or here[-1] - here[0] + 1 != len(here):
        raise InputError("'attention_mask' must be 1 at one stretch of tokens, the document, and 0 at padding.")
    return int(here[0]), int(here[-1]) + 1
