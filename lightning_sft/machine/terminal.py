"""Safe printing: no character of data, file names or models can move the terminal's cursor or run its commands."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from rich import console as rich
from rich.segment import Segment
from rich.text import Text

_JOINERS = "\u200c\u200d"  # part of how emoji and some scripts are written
_PLAIN = re.compile(r"[^\x20-\x7e\n\t]")


def printable(text: str) -> str:
    r"""The text with control and bidirectional characters escaped; newlines and tabs stay.

    >>> printable("a\n\tb\x1b[2J\u202e")
    'a\n\tb<U+001B>[2J<U+202E>'
    """
    return _PLAIN.sub(lambda character: _shown(character.group()), text)


def _shown(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs") and character not in _JOINERS
    return f"<U+{ord(character):04X}>" if hidden else character


class Console(rich.Console):
    r"""A rich console that prints only :func:`printable` text, and does not interpret markup.

    With ``soft_wrap``, lines are whole where the output is a file or a pipe; a terminal breaks them between words.

    >>> Console(highlight=False).print("a.jsonl:1 \x1b[2J [/red]")
    a.jsonl:1 <U+001B>[2J [/red]
    """

    def __init__(self, *, markup: bool = False, **settings: Any) -> None:
        super().__init__(markup=markup, **settings)
        if self.is_terminal and "force_terminal" not in settings and not self.file.isatty():
            # FORCE_COLOR, which Jupyter sets for its shells, asks for colors; there is no cursor to move
            super().__init__(markup=markup, force_terminal=False, color_system="standard", **settings)
        self.soft_wrap = self.soft_wrap and not self.is_terminal

    def render_str(self, text: str, **settings: Any) -> Text:
        """Render a string, escaped before lines are wrapped: escapes take up space."""
        return super().render_str(printable(text), **settings)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """The segments of anything; those that control the terminal are rich's own."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)
