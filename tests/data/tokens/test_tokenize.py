"""The ids of a text are those of its segments, whatever stands at their ends."""

from __future__ import annotations

import random
import re
from itertools import accumulate, combinations, pairwise
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.utils.chat_template_utils import mark_control_tokens

from lightning_sft.data.tokens.tokenize import Segments
from lightning_sft.demos import tiny_tokenizer

TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
WORDS = ["a", "b", "ab", " ", "  ", "\n", "\n\n", "user", "<", "<|", ">", "é", "ﬁ", "▁", "\t", "1 2", "."]
NORMALIZERS = {
    "none": None,
    "prepend": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "nfkc": normalizers.NFKC(),
    "strip": normalizers.Strip(),
    "lower": normalizers.Lowercase(),
}
PRE_TOKENIZERS = {
    "none": None,
    "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "bytes, prefixed": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "metaspace, first": pre_tokenizers.Metaspace(prepend_scheme="first"),
    "metaspace, always": pre_tokenizers.Metaspace(prepend_scheme="always"),
    "whitespace": pre_tokenizers.Whitespace(),
}


def tokenizer_of(normalizer: str, pre_tokenizer: str, added: list[AddedToken]) -> Tokenizer:
    """Of letters and some pairs of them, with all bytes behind."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    letters = sorted({*pre_tokenizers.ByteLevel.alphabet()} | set("▁ \n\tabuser12.<|>é"))
    pairs = [("a", "b"), ("▁", "a"), ("▁", "▁"), ("u", "s"), ("e", "r"), ("Ġ", "a"), ("Ċ", "Ċ"), ("Ġ", "Ġ")]
    for piece in [*letters, *("".join(pair) for pair in pairs)]:
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, byte_fallback=True))
    if NORMALIZERS[normalizer] is not None:
        tokenizer.normalizer = NORMALIZERS[normalizer]
    if PRE_TOKENIZERS[pre_tokenizer] is not None:
        tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.add_tokens(added)
    return tokenizer


def whole(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Each by itself."""
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def random_texts(seed: int, tokens: list[str]) -> list[str]:
    """Control tokens and words next to each other in every way."""
    draw = random.Random(seed)
    return ["".join(draw.choices([*tokens, *WORDS], k=draw.randint(0, 12))) for _ in range(200)]


@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_segments_have_the_ids_of_the_whole(normalizer: str, pre_tokenizer: str) -> None:
    tokenizer = tokenizer_of(normalizer, pre_tokenizer, [AddedToken(t, special=True, normalized=False) for t in TOKENS])
    segments, texts = Segments(tokenizer), random_texts(0, TOKENS)
    assert sum(len(segments.of(text)) > 1 for text in texts) > 100
    assert segments.token_ids(texts) == whole(tokenizer, texts)


@pytest.mark.parametrize(
    "odd",
    [
        {"lstrip": True},
        {"rstrip": True},
        {"single_word": True},
        {"normalized": True},
        {"special": False},
    ],
    ids=str,
)
def test_odd_tokens_are_found_as_before(odd: dict[str, bool]) -> None:
    plain = {"special": True, "normalized": False}
    added = [AddedToken(text, **plain | (odd if text in ("<s>", "[INST]") else {})) for text in TOKENS]
    texts = random_texts(1, TOKENS)
    for normalizer in ("lower", "strip"):
        tokenizer = tokenizer_of(normalizer, "metaspace, first", added)
        assert Segments(tokenizer).token_ids(texts) == whole(tokenizer, texts)


@pytest.mark.parametrize("other", ["x<s>", "<s>x", "<|", "a<", "<|im_end|>\n", "\n<|im_", "im_start"])
def test_tokens_that_another_can_hide_are_found_as_before(other: str) -> None:
    added = [AddedToken(text, special=True, normalized=False) for text in TOKENS]
    tokenizer = tokenizer_of("none", "bytes", [*added, AddedToken(other, special=False, normalized=False)])
    texts = random_texts(2, [*TOKENS, other, "x", "im_", "start|>"])
    assert Segments(tokenizer).token_ids(texts) == whole(tokenizer, texts)


def test_text_that_names_a_control_token_stays_text_where_the_tokenizer_says_so() -> None:
    tokenizer = tokenizer_of("none", "bytes", [AddedToken(t, special=True, normalized=False) for t in TOKENS])
    tokenizer.encode_special_tokens = True
    texts = random_texts(3, TOKENS)
    assert Segments(tokenizer).token_ids(texts) == whole(tokenizer, texts)


def plain_tokens() -> Tokenizer:
    return tokenizer_of("none", "bytes", [AddedToken(t, special=True, normalized=False) for t in TOKENS])


def test_beginnings_have_the_ids_that_they_have_by_themselves_and_say_what_follows_on_each_other() -> None:
    tokenizer = plain_tokens()
    merged = 0
    for text in random_texts(4, TOKENS)[:40]:
        places = range(len(text) + 1)
        [found] = Segments(tokenizer).beginnings([(text, places)])
        ids = [beginning.ids.tolist() for beginning in found]
        assert ids == whole(tokenizer, [text[:place] for place in places])
        assert [beginning.length for beginning in found] == [len(own) for own in ids]
        for one, other in combinations(places, 2):
            left = found[other].after(found[one])
            begins = ids[other][: len(ids[one])] == ids[one]
            assert (None if left is None else left.tolist()) == (ids[other][len(ids[one]) :] if begins else None)
            merged += not begins
    assert merged > 100  # a token reaches over the end of the first


def test_the_segment_around_a_place_is_empty_between_two_and_is_tokenized_as_in_the_whole() -> None:
    tokenizer = plain_tokens()
    segments = Segments(tokenizer)
    for text in random_texts(5, TOKENS):
        pieces = segments.of(text)
        assert "".join(pieces) == text
        assert "" not in pieces
        borders = list(accumulate(map(len, pieces), initial=0))
        tokens = re.finditer("|".join(map(re.escape, TOKENS)), text)
        within = {at for token in tokens for at in range(token.start() + 1, token.end())}
        for place in sorted(set(range(len(text) + 1)) - within):
            begin, end = segments.around(text, place)
            if place in borders and (place or not text or text.startswith(tuple(TOKENS))):
                assert (begin, end) == (place, place)
            else:
                assert (begin, end) in pairwise(borders)
                assert begin <= place < end
            before, own, after, together = whole(tokenizer, [text[:begin], text[begin:end], text[end:], text])
            assert together == before + own + after


def test_a_text_with_marks_or_of_a_tokenizer_without_a_backend_is_one_segment() -> None:
    tokenizer = tiny_tokenizer()
    slow, fast = Segments(None, tokenizer), Segments(tokenizer.backend_tokenizer, tokenizer)
    texts = ["", "a<|im_end|>b", "<|im_end|>"]
    assert slow.token_ids(texts) == fast.token_ids(texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]
    text = mark_control_tokens("a<|im_end|>", re.compile(re.escape("<|im_end|>"))) + "b<|im_end|>c"
    for segments in (slow, fast):
        assert segments.around(text, 3) == (0, len(text))
        [[before, both]] = segments.beginnings([(text, [len(text) - 1, len(text)])])
        assert tokenizer.decode(both.ids) == "a<|im_end|>b<|im_end|>c"
        assert list(both.ids).count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
        following = both.after(before)
        assert following is not None
        assert tokenizer.decode(following) == "c"
    assert slow.around("a<|im_end|>b", 11) == (0, 12)
    assert fast.around("a<|im_end|>b", 11) == (1, 12)


def test_what_texts_share_is_tokenized_once() -> None:
    tokenizer = tokenizer_of("none", "bytes", [AddedToken(t, special=True, normalized=False) for t in TOKENS])
    seen: list[list[str]] = []

    class Watched:
        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer, name)

        def encode_batch_fast(self, texts: list[str], **settings: bool) -> object:
            seen.append(texts)
            return tokenizer.encode_batch_fast(texts, **settings)

    turns = [f"<|im_start|>user\n{n}<|im_end|>" for n in range(20)]
    chats = ["".join(turns[:count]) for count in range(1, 21)]
    segments = Segments(Watched())
    known: dict[str, Any] = {}
    for some in (chats[:10], chats[10:]):  # the rows before began as these do
        found = segments.beginnings([(chat, [len(chat)]) for chat in some], known)
        assert [own.ids.tolist() for [own] in found] == whole(tokenizer, some)
    assert [len(texts) for texts in seen] == [11, 10]
