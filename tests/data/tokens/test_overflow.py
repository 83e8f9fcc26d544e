from __future__ import annotations

import pytest

from lightning_sft.data.tokens.overflow import shorten
from lightning_sft.types import Example, InputError

CHAT = Example([1, 2, 3, 4, 5, 6], [0.0, 0.0, 1.0, 0.0, 0.0, 1.0], "f:3")
TEXT = Example([1, 2, 3, 4, 5, 6, 7], [0.0, *[1.0] * 6], "f:4")


def test_truncation_keeps_the_beginning_as_it_is() -> None:
    [cut] = shorten(CHAT, 4, "truncate")
    assert (cut.input_ids, cut.target_weights, cut.provenance) == ([1, 2, 3, 4], [0.0, 0.0, 1.0, 0.0], "f:3")


def test_truncation_never_leaves_a_row_without_a_target() -> None:
    assert shorten(CHAT, 2, "truncate") == []


def test_dropping_leaves_nothing() -> None:
    assert shorten(CHAT, 4, "drop") == []


def test_a_text_is_split_into_pieces_that_hold_all_of_it() -> None:
    pieces = shorten(TEXT, 3, "split")
    trained = [t for p in pieces for t, w in zip(p.input_ids, p.target_weights, strict=True) if w > 0]
    assert trained == [2, 3, 4, 5, 6, 7]
    assert max(map(len, pieces)) == 3


def test_a_conversation_is_not_split() -> None:
    with pytest.raises(InputError, match=r"f:3: a conversation of 6 tokens cannot be split"):
        shorten(CHAT, 4, "split")


def test_an_error_names_the_row() -> None:
    with pytest.raises(InputError, match=r"f:3: the sequence has 6 tokens, more than data.max_length=4"):
        shorten(CHAT, 4, "error")


def test_a_prompt_that_is_cut_leaves_the_last_answer_whole_and_no_half_answer_trained() -> None:
    example = Example([1, 2, 3, 4, 5, 6, 7], [0.0, 1.0, 1.0, 1.0, 0.0, 2.0, 2.0], "f:3", 1)
    [cut] = shorten(example, 5, "truncate_prompt")
    assert (cut.input_ids, cut.target_weights) == ([3, 4, 5, 6, 7], [0.0, 0.0, 0.0, 2.0, 2.0])
    assert (cut.provenance, cut.answers_before) == ("f:3", 1)
    [cut] = shorten(example, 3, "truncate_prompt")
    assert (cut.input_ids, cut.target_weights) == ([5, 6, 7], [0.0, 2.0, 2.0])
    assert shorten(example, 2, "truncate_prompt") == []
