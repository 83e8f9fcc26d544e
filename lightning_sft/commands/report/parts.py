"""Parts of a report's page. All text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def section(title: str, kind: str, cards: Sequence[str]) -> str:
    """A heading with cards below; empty without any.

    Args:
        title: Text of the heading.
        kind: ``samples`` below each other, or ``charts`` side by side.
        cards: Cards as HTML.
    """
    inner = "".join(cards)
    name = "samples" if kind == "samples" else "grid charts"
    return f'<h2 class="part">{escape(title)}</h2><section class="{name}">{inner}</section>' if inner else ""


def card(title: str, inner: str, kind: str = "") -> str:
    """A card with a title; of the whole width of the page if ``kind`` is ``wide``."""
    return f'<section class="card {kind}"><h2>{escape(title)}</h2>{inner}</section>'


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
    lines = (f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows[1:])
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def pairs(values: Mapping[str, Any]) -> str:
    """A table of names and values."""
    lines = (f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in values.items())
    return f'<table class="facts">{"".join(lines)}</table>'


def pre(text: str) -> str:
    """Text as it is."""
    return f'<pre tabindex="0">{escape(text.strip())}</pre>'
