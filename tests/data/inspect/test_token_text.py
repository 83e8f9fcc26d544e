"""What is read is every token, once, and nothing invisible stays invisible."""

from __future__ import annotations

import sys
import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.data.inspect.documents import Document
from lightning_sft.data.inspect.token_text import PieceReader, visible
from lightning_sft.demos import tiny_tokenizer

READER = PieceReader(tiny_tokenizer())


def document(text: str, weights: list[float] | None = None) -> Document:
    ids = torch.tensor(tiny_tokenizer()(text)["input_ids"], dtype=torch.long)
    return Document(ids, torch.zeros(len(ids)) if weights is None else torch.tensor(weights))


@given(st.text())
def test_the_pieces_are_the_text_and_have_each_token_once(text: str) -> None:
    whole = document(text)
    pieces = READER.read(whole)
    assert [i for piece in pieces for i in piece.ids] == whole.input_ids.tolist()
    assert "".join(piece.text for piece in pieces) == visible(text)


def test_tokens_that_make_one_character_are_one_piece() -> None:
    assert [(p.text, len(p.ids)) for p in READER.read(document("né🎉"))] == [("n", 1), ("é", 2), ("🎉", 4)]


def test_a_character_that_is_half_trained_is_not_one_piece() -> None:
    assert [(p.text, p.weight) for p in READER.read(document("é", [0.0, 1.0]))] == [("\ufffd", 0.0), ("\ufffd", 1.0)]


def test_control_tokens_are_told_apart() -> None:
    assert [p.text for p in READER.read(document("<|im_start|>a<|im_end|>")) if p.is_special] == [
        "<|im_start|>",
        "<|im_end|>",
    ]


def test_tokens_that_are_no_text_are_read() -> None:
    ids = torch.tensor(tiny_tokenizer()("é")["input_ids"][:1] * 6)
    assert [p.text for p in READER.read(Document(ids, ids * 0.0))][-1].endswith("\ufffd")


@pytest.mark.parametrize("character", ["\x1b", "\x07", "\x9b", "\u202e", "\u2066", "\u200b", "\ufeff", "\u2028"])
def test_what_moves_a_cursor_or_turns_the_writing_is_written_out(character: str) -> None:
    assert visible(f"a{character}b") == f"a<U+{ord(character):04X}>b"


IGNORABLE = [0xAD, 0x34F, 0x115F, 0x1160, 0x17B4, 0x180E, 0x2060, 0x2065, 0x3164, 0xFE00, 0xFFA0, 0xE0041, 0xE0100]


@pytest.mark.parametrize(
    "character",
    [*(c for c in map(chr, range(sys.maxunicode)) if unicodedata.category(c) == "Zs"), *map(chr, IGNORABLE)],
)
def test_what_is_seen_as_a_space_or_not_at_all_is_written_out(character: str) -> None:
    assert visible(f"a{character}b") == (f"a<U+{ord(character):04X}>b" if character != " " else "a b")


def test_emoji_are_left_as_they_are() -> None:
    assert visible("👩\u200d🚀 ❤\ufe0f naïve\n\t") == "👩\u200d🚀 ❤\ufe0f naïve⏎\n⇥\t"


def test_text_that_reads_like_control_tokens_is_between_marks_however_often_it_is_there() -> None:
    tokenizer = tiny_tokenizer()
    fake, real = "x<|im_end|><|im_end|>y", "<|im_end|>"
    apart = [i for character in fake for i in tokenizer(character)["input_ids"]]
    ids = torch.tensor([*tokenizer(real)["input_ids"], *apart, *tokenizer(real)["input_ids"]])
    pieces = PieceReader(tokenizer).read(Document(ids, ids * 0.0))
    assert "".join(piece.text for piece in pieces) == f"{real}x⟨{real}⟩⟨{real}⟩y{real}"
    assert [i for piece in pieces for i in piece.ids] == ids.tolist()
