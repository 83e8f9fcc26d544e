"""Handling of sequences longer than the maximum length."""

from __future__ import annotations

from typing import Literal

from lightning_sft.types import Example, InputError

Overflow = Literal["error", "drop", "truncate", "split"]


def shorten(example: Example, max_length: int, overflow: Overflow) -> list[Example]:
    """A sequence that is too long as none, one or several that are not.

    ``truncate`` keeps the beginning: the context of what is kept stays exact, and no stop token is put where the answer
    does not end. ``split`` makes pieces of a plain text; a part of a conversation would lack its context.

    Args:
        example: Longer than ``max_length``.
        max_length: Maximum number of tokens in a sequence.
        overflow: Strategy; ``drop`` returns nothing, and so does ``truncate`` if no target is left.

    Raises:
        InputError: If ``overflow`` is ``error``, or is ``split`` for a conversation.

    >>> text = Example([5, 6, 7, 8, 9], [0.0, 1.0, 1.0, 1.0, 1.0])
    >>> [list(piece.input_ids) for piece in shorten(text, 3, "split")]
    [[5, 6, 7], [7, 8, 9]]
    """
    length, where = len(example), example.provenance
    if overflow == "error":
        raise InputError(f"{where}: the sequence has {length:,} tokens, more than data.max_length={max_length:,}.")
    if overflow == "drop":
        return []
    begins = [0]
    if overflow == "split":
        if not all(weight > 0 for weight in example.target_weights[1:]):
            raise InputError(
                f"{where}: a conversation of {length:,} tokens cannot be split: its second part would be trained "
                f"without its context. Raise data.max_length={max_length:,}, or use data.overflow=truncate or drop."
            )
        begins = list(range(0, length - 1, max_length - 1))  # a piece's last token is the next one's first context
    parts = [slice(begin, begin + max_length) for begin in begins]
    before = example.answers_before
    pieces = [Example(example.input_ids[p], [0.0, *example.target_weights[p][1:]], where, before) for p in parts]
    return [piece for piece in pieces if any(weight > 0 for weight in piece.target_weights[1:])]
