"""Handling of sequences longer than the maximum length."""

from __future__ import annotations

from typing import Literal

from lightning_sft.types import Example, InputError

Overflow = Literal["error", "drop", "truncate", "truncate_prompt", "split"]


def shorten(example: Example, max_length: int, overflow: Overflow) -> list[Example]:
    """A sequence that is too long as none, one or several that are not.

    ``truncate`` keeps the beginning: the context of what is kept stays exact, and no stop token is put where the answer
    does not end. ``truncate_prompt`` keeps the end, with the last answer: its context lacks its beginning, so it is not
    what the model gets at inference, and an earlier answer that the cut goes through is not trained. ``split`` makes
    pieces of a plain text; a part of a conversation would lack its context.

    Args:
        example: Longer than ``max_length``.
        max_length: Maximum number of tokens in a sequence.
        overflow: Strategy; ``drop`` returns nothing, and so does ``truncate`` if no target is left, and
            ``truncate_prompt`` if the last answer alone is too long.

    Raises:
        InputError: If ``overflow`` is ``error``, or is ``split`` for a conversation.

    >>> text = Example([5, 6, 7, 8, 9], [0.0, 1.0, 1.0, 1.0, 1.0])
    >>> [list(piece.input_ids) for piece in shorten(text, 3, "split")]
    [[5, 6, 7], [7, 8, 9]]
    >>> [list(piece.input_ids) for piece in shorten(Example([5, 6, 7, 8], [0.0, 0.0, 0.0, 1.0]), 3, "truncate_prompt")]
    [[6, 7, 8]]
    """
    length, where = len(example), example.provenance
    if overflow == "error":
        raise InputError(f"{where}: the sequence has {length:,} tokens, more than data.max_length={max_length:,}.")
    if overflow == "drop":
        return []
    if overflow == "truncate_prompt":
        return _without_beginning(example, length - max_length)
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


def _without_beginning(example: Example, size: int) -> list[Example]:
    """An example without its first tokens; nothing, where they go into its last answer."""
    weights = list(example.target_weights)
    targets = [i for i, weight in enumerate(weights) if weight > 0]
    begin = next((i for i in reversed(targets) if not weights[i - 1] > 0), 0)  # of the last answer
    if size >= begin or not targets:
        return []
    if weights[size - 1] > 0:  # the cut goes through an answer, or just behind one
        end = next(i for i in range(size, len(weights)) if not weights[i] > 0)
        weights[size:end] = [0.0] * (end - size)
    kept = Example(example.input_ids[size:], [0.0, *weights[size + 1 :]], example.provenance, example.answers_before)
    return [kept]
