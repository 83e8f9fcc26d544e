"""Numbers of things, in words."""

from __future__ import annotations

from collections.abc import Sequence

_MIB, _GIB = 1 << 20, 1 << 30
_OF_ONE = {"are": "is", "were": "was", "have": "has", "make": "makes"}


def counted(number: int, noun: str, verb: str = "") -> str:
    """A number of things, of which there may be one.

    Args:
        number: How many there are.
        noun: Name of one of them.
        verb: Verb after several of them, if one follows.

    >>> counted(1, "row"), counted(1200, "packed micro-batch"), counted(0, "target")
    ('1 row', '1,200 packed micro-batches', '0 targets')
    >>> counted(1, "row", "have"), counted(2, "row", "have")
    ('1 row has', '2 rows have')
    """
    plural = f"{noun}es" if noun.endswith(("ch", "s", "x")) else f"{noun}s"
    words = [f"{number:,}", noun if number == 1 else plural, _OF_ONE.get(verb, verb) if number == 1 else verb]
    return " ".join(filter(None, words))


def listed(names: Sequence[str], most: int) -> str:
    """The first of some names, and how many more there are.

    Args:
        names: All names.
        most: Maximum number of those that are written out.

    >>> listed(["a", "b", "c"], most=2), listed(["a", "b"], most=2)
    ('a, b and 1 more', 'a, b')
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def memory(size: float) -> str:
    """A number of bytes in the unit that it is written in with two decimals.

    >>> memory(3 * 2**29), memory(2**20)
    ('1.50 GiB', '1.00 MiB')
    """
    return f"{size / _GIB:,.2f} GiB" if size >= _GIB / 10 else f"{size / _MIB:,.2f} MiB"
