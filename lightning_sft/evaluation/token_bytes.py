"""Number of UTF-8 bytes of each token, to compare metrics between tokenizers."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def token_bytes(tokenizer: PreTrainedTokenizerBase | None) -> Tensor | None:
    r"""UTF-8 bytes of each token of the vocabulary, ``[V]`` int64; 0 for control tokens, which are no text.

    They add up to the bytes of a text: tokens of byte-level vocabularies have a character for each byte, and others
    have ``▁`` for a space and ``<0x0A>`` for a byte. ``None`` where the vocabulary is of neither kind.

    Args:
        tokenizer: Transformers tokenizer with a ``tokenizers`` backend.

    >>> from lightning_sft.demos import tiny_tokenizer
    >>> table = token_bytes(tiny_tokenizer())
    >>> table[tiny_tokenizer()("naïve<|im_end|>")["input_ids"]].tolist()
    [1, 1, 1, 1, 1, 1, 0]
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if tokenizer is None or backend is None:
        return None
    state = json.loads(backend.to_str())
    decoder = json.dumps(state["decoder"], ensure_ascii=False)
    is_byte_level = '"ByteLevel"' in decoder
    if not is_byte_level and "▁" not in decoder:
        return None
    added = tokenizer.added_tokens_decoder
    control = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    sizes = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.long)
    for token, number in vocabulary.items():
        if number in control:
            continue
        if number in added:
            sizes[number] = len(token.encode())
        elif is_byte_level:
            sizes[number] = len(token)
        else:
            sizes[number] = 1 if _BYTE.fullmatch(token) else len(token.replace("▁", " ").encode())
    return sizes
