"""Token ids to text that a person can read, token by token: nothing invisible stays invisible."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.inspect.documents import Document
from lightning_sft.data.tokens.control_tokens import any_of
from lightning_sft.machine.terminal import printable

LOOKALIKE = "⟨⟩"
"""Between them stands plain text that reads like a control token."""

# what Unicode lets be ignored where it is not supported, but for joiners and the variants of emoji, and other spaces
_IGNORABLE = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2060-\u206f\u3164\ufe00-\ufe0d\uffa0\ufff0-\ufff8"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_SPACES = "\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000"  # those of Unicode's category Zs, without the usual one
_BLANK = re.compile(f"[{_SPACES}{_IGNORABLE}]")


@dataclass(frozen=True)
class Piece:
    """The text of one token, or of several that only together make a character.

    Args:
        text: Displayed text; a newline is shown as ``⏎`` and a line break.
        ids: Token ids of the text.
        weight: The weight that they are trained with; 0 is context.
        is_special: Whether it is a control token of the tokenizer.
    """

    text: str
    ids: tuple[int, ...]
    weight: float
    is_special: bool


class PieceReader:
    r"""Reads documents token by token.

    Args:
        tokenizer: Tokenizer of the model.

    >>> from lightning_sft.demos import tiny_tokenizer
    >>> import torch
    >>> ids = torch.tensor(tiny_tokenizer()("é\n<|im_end|>")["input_ids"])
    >>> [(piece.text, len(piece.ids)) for piece in PieceReader(tiny_tokenizer()).read(Document(ids, ids * 0.0))]
    [('é', 2), ('⏎\n', 1), ('<|im_end|>', 1)]
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset(added.union(tokenizer.all_special_ids))
        self._tokenizer = tokenizer
        self._lookalikes = any_of({text for i in self.special_ids if (text := self._plain((i,))).strip()})
        self._text = lru_cache(1 << 20)(self._decode)

    def read(self, document: Document) -> list[Piece]:
        """The document in pieces, in order; together they have each of its tokens once."""
        ids, weights = document.input_ids.tolist(), document.target_weights.tolist()
        pieces, begin = [], 0
        while begin < len(ids):
            before, end = tuple(ids[max(begin - 1, 0) : begin]), begin + 1
            text = self._text(before, tuple(ids[begin:end]))
            while text.endswith("\ufffd") and end < len(ids) and self._joins(ids, weights, begin, end):
                end += 1
                text = self._text(before, tuple(ids[begin:end]))
            own = tuple(ids[begin:end])
            pieces.append(Piece(visible(text), own, weights[begin], own[0] in self.special_ids))
            begin = end
        return self._with_marks(pieces)

    def _with_marks(self, pieces: list[Piece]) -> list[Piece]:
        """Pieces of plain text that together read like a control token, between ⟨ and ⟩."""
        plain = "".join("\0" * len(piece.text) if piece.is_special else piece.text for piece in pieces)
        begins = np.cumsum([0, *(len(piece.text) for piece in pieces)])
        for found in reversed(list(self._lookalikes.finditer(plain))):
            for place, number in ((found.end() - 1, 1), (found.start(), 0)):
                which = int(np.searchsorted(begins, place, "right")) - 1
                text, at = pieces[which].text, place - int(begins[which]) + number
                pieces[which] = replace(pieces[which], text=f"{text[:at]}{LOOKALIKE[number]}{text[at:]}")
        return pieces

    def _joins(self, ids: list[int], weights: list[float], begin: int, end: int) -> bool:
        """Whether token ``end`` may complete the character begun at ``begin``: UTF-8 has 4 bytes a character."""
        return end - begin < 4 and weights[end] == weights[begin] and ids[end] not in self.special_ids

    def _decode(self, before: tuple[int, ...], ids: tuple[int, ...]) -> str:
        """The text of tokens after another: at the beginning of a text, some tokenizers would drop a space."""
        prefix, whole, alone = (self._plain(part) for part in (before, before + ids, ids))
        return whole.removeprefix(prefix) if whole.startswith(prefix) else alone

    def _plain(self, ids: tuple[int, ...]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def visible(text: str) -> str:
    r"""The text with invisible characters written out: newlines as ``⏎`` and a line break, tabs as ``⇥`` and a tab.

    A space is a space, and any other, such as one that does not break a line, is written out as well.

    It is safe to print: no character of the data moves a terminal's cursor or turns the direction of writing.

    >>> visible("a\nb\x1b[0m\u202e \xa0")
    'a⏎\nb<U+001B>[0m<U+202E> <U+00A0>'
    """
    text = _BLANK.sub(lambda found: f"<U+{ord(found.group()):04X}>", text)
    return printable(text).replace("\n", "⏎\n").replace("\t", "⇥\t")
