from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_sft.demos import tiny_tokenizer
from lightning_sft.evaluation.token_bytes import token_bytes

TEXTS = ["", "plain words", "naïve 漢字", "🎉\n\n", "  two  spaces", "tab\tand <think> no control"]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: ▁ for spaces, bytes for what the vocabulary lacks."""
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{i:02X}>": i + 2 for i in range(256)}}
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz", "ï", "漢"]:
        vocabulary[piece] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), sentencepiece_like()])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_have_the_bytes_of_the_text_and_control_tokens_have_none(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    table = token_bytes(tokenizer)
    assert table is not None
    ids = tokenizer(text + tokenizer.eos_token)["input_ids"]
    assert table[ids].sum() == len(text.encode())


def test_a_vocabulary_that_cannot_be_counted_has_no_table() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=words)) is None
    assert token_bytes(None) is None
