"""``{% generation %}`` marks of a chat template: what its author means to be trained, held against parity.

transformers tells which spans of a rendered conversation are marked. They have to cover what the model writes at
inference: the answer from the end of the generation prompt up to and with the stop token. What they mark of that prompt
is context all the same. They decide how much of a stop is trained where it is made of several tokens. Whitespace after
a stop token is not trained, marked or not, nor is what follows on it: at inference, generation has ended by then.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from jinja2 import Template

from lightning_sft.types import InputError

Span = tuple[int, int]
"""Where a marked text begins and ends in a rendered conversation, in characters."""


def has_marks(template: str) -> bool:
    """Whether a chat template marks anything; a comment that speaks of marks does not.

    >>> has_marks("{%- generation -%} {{ content }} {%- endgeneration -%}"), has_marks("{# no {% generation %} #}")
    (True, False)
    """
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", re.sub(r"(?s)\{#.*?(#\}|\Z)", "", template)) is not None


def render_with_marks(template: Template, variables: Mapping[str, Any]) -> tuple[str, list[Span]]:
    """The text that a template of :mod:`lightning_sft.data.tokens.sandbox` renders, and the spans of it that it marks.

    >>> from lightning_sft.data.tokens.sandbox import template_environment
    >>> text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
    >>> compiled = template_environment().from_string(text)
    >>> render_with_marks(compiled, {"messages": [{"content": "Hi"}, {"content": "Yo"}]})
    ('Hi;Yo;', [(0, 2), (3, 5)])
    """
    environment: Any = template.environment
    pieces: list[str] = []
    spans: list[Span] = []
    with environment.activate_tracker(pieces, spans):  # of transformers' extension, which measures what is there so far
        for piece in template.generate(variables):
            pieces.append(piece)
    return "".join(pieces), spans


def marked_end(text: str, begin: int, stop: int, spans: Iterable[Span], special: re.Pattern[str]) -> int:
    """Where the trained text of an answer ends: after its stop token and the marked special tokens that adjoin it.

    Marks that begin before the answer are no mistake: what the model is given at inference is context all the same.

    Args:
        text: The rendered conversation; it ends with the answer.
        begin: Start of the answer: the end of the generation prompt.
        stop: End of the answer's stop token.
        spans: Marked spans of the text.
        special: Matches a special token.

    Raises:
        InputError: When the marks do not cover the answer with its stop token.

    >>> marked_end("Q:A</r></s>", 2, 7, [(2, 11)], re.compile("</.>"))
    11
    """
    marks = sorted(span for span in spans if max(begin, span[0]) < span[1])  # those of earlier answers end before it
    covered = begin
    for first, last in marks:
        covered = max(covered, last) if first <= covered else covered
    problem = ""
    if not marks:
        problem = "do not mark the answer"
    elif covered < stop:
        missing = min([first for first, _ in marks if first > covered] + [stop])
        problem = f"leave out {reprlib.repr(text[covered:missing])}"
        if missing == stop:
            problem += ", the end of the answer with its stop token, so the model would never learn to stop"
    if problem:
        raise InputError(
            f"the {{% generation %}} marks of the chat template {problem}. They have to cover what the model writes at "
            "inference, from the end of the generation prompt up to and with the stop token: "
            f"{reprlib.repr(text[begin:stop])}. Move the marks, or take them out: data.chat_template."
        )
    while (token := special.match(text, stop)) and token.end() <= covered:
        stop = token.end()
    return stop
