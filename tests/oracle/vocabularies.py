"""Tokenizers of the kinds that models have, small and without the hub, with the control tokens of a template."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

from tests.oracle.families import Family, family_of
from tests.oracle.fields import MARKUP

CONTROL = re.compile(
    r"</?s>|<\|?[A-Za-z_/][\w:/▁]*\|?>|<｜[^｜<>{}]+｜>|\[/?[A-Z_]{2,}\]|\]~b\]|\[e~\[|\]~!b\[|\]<\]minimax\[>\["
)
OTHER = "<filename>"
"""A special token that no template writes."""

_WRITTEN = re.compile(r"<\|[a-z_]+\|>|<\|[a-z_]+>|<[a-z_]+\|>|<｜[^｜<>{}]+｜>")


def control_tokens_of(template: str) -> list[str]:
    """What looks like a control token in a template, or in what it renders."""
    found = {match.group() for match in CONTROL.finditer(template)}
    found |= _written(template, family_of(template))
    return sorted(found)


def _written(template: str, family: Family) -> set[str]:
    """Control tokens that a template puts together."""
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    try:
        text = _compile_jinja_template(template).render(
            messages=turns, bos_token=family.bos, eos_token=family.eos, add_generation_prompt=True, tools=None
        )
    except Exception:
        return set()
    return set(_WRITTEN.findall(text))


def tokenizer_for(template: str, kind: str = "bytes") -> PreTrainedTokenizerFast:
    """A tokenizer of some kind for a template."""
    family = family_of(template)
    backend, flags, all_special = KINDS[kind]()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        clean_up_tokenization_spaces=False,
    )
    found = sorted({*control_tokens_of(template), *family.stops, OTHER})
    tokenizer.add_tokens(
        [
            AddedToken(
                token,
                special=not MARKUP.fullmatch(token) and (all_special or token in (OTHER, family.eos, family.bos)),
                normalized=False,
                **(flags if not MARKUP.fullmatch(token) and token != OTHER else {}),
            )
            for token in found
        ]
    )
    tokenizer.chat_template = template
    return tokenizer


Made = tuple[Tokenizer, dict[str, Any], bool]


def _bytes() -> Made:
    """Byte-level BPE, with a few merges that reach over the boundary of prompt and answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Y"), ("Y", "o"), ("Ġ", "Ġ"), (">", "Ċ")]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend, {}, True


def _markers() -> Made:
    """The same with turn markers that are added tokens, but not special, as DeepSeek's."""
    backend, flags, _ = _bytes()
    return backend, flags, False


def _pieces(merges: Sequence[tuple[str, str]]) -> Tokenizer:
    own = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation, "\n"]
    tokens = dict.fromkeys(["<unk>", *own, *letters, *("".join(pair) for pair in merges)])
    vocab = {token: i for i, token in enumerate(tokens)}
    return Tokenizer(models.BPE(vocab=vocab, merges=list(merges), unk_token="<unk>", byte_fallback=True, fuse_unk=True))


_MERGES = [("▁", "Y"), ("▁Y", "o"), ("Y", "o"), ("▁", "▁"), ("y", "e"), ("ye", "s"), ("▁", "yes"), ("\n", "\n")]


def _metaspace(scheme: str) -> Made:
    backend = _pieces(_MERGES)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend, {}, True


def _legacy() -> Made:
    """A normalizer puts a blank before each text, and control tokens take the blanks behind them, as Phi-3's."""
    backend = _pieces(_MERGES)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend, {"rstrip": True}, True


KINDS: dict[str, Callable[[], Made]] = {
    "bytes": _bytes,
    "markers": _markers,
    "metaspace": lambda: _metaspace("first"),
    "metaspace_always": lambda: _metaspace("always"),
    "legacy": _legacy,
}
