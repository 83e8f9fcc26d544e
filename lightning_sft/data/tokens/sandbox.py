"""The environment in which chat templates are compiled and rendered: that of transformers, quicker and bounded."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from jinja2.runtime import LoopContext
from jinja2.sandbox import SandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

MAX_SIZE = 1_000_000
"""Characters or items that ``*`` may make, and bits of a number that ``*`` and ``**`` may make."""

_OF_DICT = frozenset(dir(dict))
_HARMLESS = {
    str: frozenset({"split", "strip", "lstrip", "rstrip", "startswith", "endswith", "replace", "lower", "upper"}),
    LoopContext: frozenset({"index", "index0", "first", "last", "previtem", "nextitem", "length", "revindex"}),
}


@lru_cache(maxsize=1)
def template_environment() -> SandboxedEnvironment:
    """The environment of transformers, in which looking a key up in a dictionary is quick, and products are bounded.

    One operation on huge numbers is interrupted by no timer, and where its operands are constants, it would run when a
    template is compiled.

    >>> template_environment().from_string("{{ '-' * 3 }} {{ 2 ** 9 }}").render()
    '--- 512'
    >>> template_environment().from_string("{{ 9 ** 40000000 }}").render()
    Traceback (most recent call last):
        ...
    OverflowError: 9 ** 40000000 is longer than 1,000,000 bits
    """
    environment: SandboxedEnvironment = _compile_jinja_template("").environment.overlay()
    environment.intercepted_binops = frozenset({"*", "**"})
    environment.binop_table = {**environment.binop_table, "*": _times, "**": _power}
    environment.__dict__["getattr"] = _quick_getattr(environment)  # of this one alone, not of its class
    return environment


def _times(left: Any, right: Any) -> Any:
    for size, number in ((left, right), (right, left)):
        if isinstance(number, int) and isinstance(size, (str, bytes, list, tuple)) and len(size) * number > MAX_SIZE:
            raise OverflowError(f"{len(size):,} characters or items * {number} are more than {MAX_SIZE:,}")
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MAX_SIZE:
        raise OverflowError(f"a number is longer than {MAX_SIZE:,} bits")
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_SIZE:
        raise OverflowError(f"{left} ** {right} is longer than {MAX_SIZE:,} bits")
    return left**right


def _quick_getattr(environment: SandboxedEnvironment) -> Callable[[Any, str], Any]:
    """What ``message.content`` is in the sandbox, without its checks where they find nothing."""
    checked, namespace = environment.getattr, environment.globals.get("namespace")

    def looked_up(obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict and attribute not in _OF_DICT:  # a key, or nothing
            return obj[attribute] if attribute in obj else environment.undefined(obj=obj, name=attribute)
        if attribute in _HARMLESS.get(kind, ()):
            return getattr(obj, attribute)
        if kind is namespace and attribute[0] != "_":  # it has what the template has put there, and nothing else
            return getattr(obj, attribute, environment.undefined(obj=obj, name=attribute))
        return checked(obj, attribute)

    return looked_up
