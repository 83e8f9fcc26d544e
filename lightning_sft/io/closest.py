"""The known name that a mistyped one may have meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(given: Iterable[str], known: Iterable[str], prefix: str = "", cutoff: float | None = None) -> str:
    """A question after the first of the given names that is close to a known one but none; else nothing.

    Args:
        given: Words of a message, or what was typed.
        known: Valid names.
        prefix: Prefix of the suggested name in the question.
        cutoff: Minimum similarity, from 0 to 1, ignoring case; by default higher for dotted names, which share more.

    >>> did_you_mean(["fti"], ["fit", "test"])
    ' Did you mean fit?'
    >>> did_you_mean(["model.lr"], ["model.lora", "model.optimizer.lr"])
    ' Did you mean model.optimizer.lr?'
    >>> did_you_mean(["fit"], ["fit", "test"])
    ''
    """
    names = {name.lower(): name for name in known}
    for name in given:
        if name in names.values():
            continue
        before, dot, last = name.rpartition(".")
        deeper = [other for other in names.values() if dot and other.startswith(before) and other.endswith(dot + last)]
        if len(deeper) == 1:
            return f" Did you mean {prefix}{deeper[0]}?"
        least = cutoff or (0.75 if dot else 0.6)
        if close := get_close_matches(name.lower(), names, n=1, cutoff=least):
            return f" Did you mean {prefix}{names[close[0]]}?"
    return ""
