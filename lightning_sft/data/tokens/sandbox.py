"""The environment in which chat templates are compiled and rendered: that of transformers, quicker and bounded."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from jinja2.sandbox import SandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

from lightning_sft.data.tokens.quick_code import HARMLESS, OF_DICT, QuickCode

_MOST_JSON = 1024  # objects whose JSON is kept

MAX_SIZE = 1_000_000
"""Characters or items that ``*`` may make, and bits of a number that ``*`` and ``**`` may make."""


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
    own: dict[str, Any] = environment.__dict__  # of this one alone, not of its class
    own |= {"getattr": _quick_getattr(environment), "getitem": _quick_getitem(environment)}
    environment.code_generator_class = QuickCode
    environment.filters = {**environment.filters, "tojson": JsonOnce(environment.filters["tojson"])}
    return environment


class JsonOnce:
    """``tojson``, which writes an object once for a conversation: each of its beginnings has the same tools and calls.

    An object is known again by its identity, so :meth:`forget` comes before one might have been changed.

    Args:
        write: The filter.

    >>> import json
    >>> tojson, tools = JsonOnce(json.dumps), [{"name": "f"}]
    >>> tojson(tools), tojson(tools) is tojson(tools), tojson(tools, indent=None) is tojson(tools)
    ('[{"name": "f"}]', True, False)
    """

    def __init__(self, write: Callable[..., str]) -> None:
        self.write, self._known = write, dict[Any, tuple[Any, str]]()

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> str:
        """The JSON of an object."""
        if type(x) is not dict and type(x) is not list:
            return self.write(x, *args, **kwargs)
        key = id(x), repr((args, kwargs)) if args or kwargs else ""
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _MOST_JSON:
                self.forget()
            found = self._known[key] = x, self.write(x, *args, **kwargs)  # the object too: its id stays its own
        return found[1]

    def forget(self) -> None:
        """Forget what has been written: another conversation begins."""
        self._known.clear()


def forget_json() -> None:
    """Have ``tojson`` write all objects again, see :class:`JsonOnce`."""
    template_environment().filters["tojson"].forget()


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
    checked, namespace, missing = environment.getattr, environment.globals.get("namespace"), _missing(environment)

    def looked_up(obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict and attribute not in OF_DICT:  # a key, or nothing
            return obj[attribute] if attribute in obj else missing(attribute)
        if attribute in HARMLESS.get(kind, ()):
            return getattr(obj, attribute)
        if kind is namespace and attribute[0] != "_":  # it has what the template has put there, and nothing else
            attributes = object.__getattribute__(obj, "_Namespace__attrs")
            return attributes[attribute] if attribute in attributes else checked(obj, attribute)
        return checked(obj, attribute)

    return looked_up


def _quick_getitem(environment: SandboxedEnvironment) -> Callable[[Any, Any], Any]:
    """What ``message["content"]`` is in the sandbox, quickly where there is no such key."""
    checked, missing = environment.getitem, _missing(environment)

    def looked_up(obj: Any, argument: Any) -> Any:
        if type(obj) is dict and type(argument) is str and argument not in OF_DICT:
            return obj[argument] if argument in obj else missing(argument)
        return checked(obj, argument)

    return looked_up


def _missing(environment: SandboxedEnvironment) -> Callable[[str], Any]:
    """What stands for a key that a dictionary lacks: it only knows that it was a dictionary's, and the key."""
    return lru_cache(maxsize=1024)(lambda key: environment.undefined(obj={}, name=key))
