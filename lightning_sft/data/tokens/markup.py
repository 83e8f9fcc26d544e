"""What of a rendered text is markup of a turn, and what is said."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightning_sft.data.tokens.answer_shape import num_shared

_TAGS = re.compile(r"</?\w[^<>\n]*>|\[/?[A-Z_]+\]")
_MAX_HEADER = 80


@dataclass(frozen=True)
class Markup:
    r"""Markup of a template: control tokens, and tags.

    Args:
        tokens: Matches a control token.

    >>> markup = Markup(re.compile(r"<\|\w+\|>"))
    >>> markup.shared("<|im_end|>", "<|im_start|>")
    0
    >>> markup.beginning_of("</tool_response><|im_end|> # Tools"), markup.beginning_of(" # Tools")
    ('</tool_response><|im_end|>', '')
    >>> markup.is_header("<|im_start|>user\n"), markup.is_header("You are an assistant.\nToday is Friday.\n")
    (True, False)
    """

    tokens: re.Pattern[str]

    def shared(self, a: str, b: str) -> int:
        """How far two texts are the same, up to the beginning of a token or tag that they have not both."""
        shared = num_shared(a, b)
        for pattern in (self.tokens, _TAGS):
            for text in (a, b):
                spans = (found.span() for found in pattern.finditer(text[: shared + 256]))
                shared = min([shared, *(begin for begin, end in spans if begin < shared < end)])
        return shared

    def beginning_of(self, text: str) -> str:
        """The beginning of a text that is markup: no words but those of tokens, and of tags that close something."""
        ends = dict(found.span() for found in _TAGS.finditer(text) if "/" in found.group())
        ends |= dict(found.span() for found in self.tokens.finditer(text))
        place = kept = 0
        while place < len(text):
            if place in ends:
                place = kept = ends[place]
            elif text[place].isalnum() or text[place] == "_":
                return text[:kept]
            else:
                place += 1
        return text

    def has_words(self, text: str) -> bool:
        """Whether something is said in a text, besides tokens and tags."""
        return bool(re.search(r"\w", self._said(text)))

    def is_header(self, text: str) -> bool:
        """Whether a text has at most one line of words besides tokens and tags, and not many: more is no header."""
        said = self._said(text)
        return len([line for line in said.splitlines() if re.search(r"\w", line)]) <= 1 and len(said) <= _MAX_HEADER

    def _said(self, text: str) -> str:
        return _TAGS.sub("", self.tokens.sub("", text))
