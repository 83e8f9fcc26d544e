"""One Jinja template, rendered as ``apply_chat_template`` renders it: often, with a fixed date, and in bounded time.

The renders of all beginnings of a conversation cost the square of its length. Most templates go through the messages
once and write each as they come to it. :meth:`Renderer.trace` watches such a template while it renders all messages:
what it has written before it takes message k can only depend on the messages before it, so that is also what it writes
for a conversation that ends there. Where this is not so, or cannot be seen, each beginning is rendered by itself.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cached_property, lru_cache
from string import ascii_letters
from threading import current_thread, main_thread
from typing import Any, overload

from jinja2 import nodes

from lightning_sft.data.tokens.generation_tags import Span, has_marks, render_with_marks
from lightning_sft.data.tokens.sandbox import template_environment
from lightning_sft.types import InputError, Message

FROZEN_DATE = date(2024, 7, 26)
"""Date for templates that print today's date: training must not depend on the day it runs."""

MAX_SECONDS = 60.0
"""Of rendering one conversation; a template is a program that somebody else has written."""

_ONWARDS = frozenset({"index", "index0", "first", "previtem", "cycle", "changed", "depth", "depth0"})  # of a loop


@contextmanager
def in_time() -> Iterator[Callable[[], object]]:
    """Stop what renders a conversation after :data:`MAX_SECONDS`, where the system has timers for it.

    It needs the main thread and a system with ``SIGALRM``, and leaves a timer of somebody else's alone. It gives what
    starts the time again, for the next conversation.

    Raises:
        TimeoutError: When it has not ended by then. It is no refusal of a row: those must not depend on a clock.
    """
    has_timers = hasattr(signal, "setitimer") and current_thread() is main_thread()
    if not has_timers or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield lambda: None
        return
    before = signal.signal(signal.SIGALRM, _too_late)

    def start() -> object:
        return signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)

    start()
    try:
        yield start
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Trace:
    """The render of a whole conversation, in which those of its beginnings are found.

    Args:
        text: What the template writes for all messages, without what follows the last.
        begins: Where each message begins in the text, and where the last ends; 0 where that cannot be said.
        prompt: What the template adds for generation.
        end: What it adds otherwise, most often nothing.
    """

    text: str
    begins: Sequence[int]
    prompt: str
    end: str


class Renderer:
    """A template.

    Args:
        text: Source text of the template.
        special_tokens: The tokenizer's special tokens by name, which are variables of the template.
        day: The date that it is told.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, Any], day: date = FROZEN_DATE) -> None:
        self.source = text
        self.text = _frozen(text, day)
        self.has_marks = has_marks(text)
        self.special_tokens = dict(special_tokens)

    @cached_property
    def _compiled(self) -> Any:
        refuse_random(self.text)
        compiled = template_environment().from_string(self.text)
        compiled.globals = dict(compiled.globals)  # a chain of dictionaries would be walked at each render
        return compiled

    @cached_property
    def _can_be_traced(self) -> bool:
        return not self.has_marks and _goes_through_once(self.text)

    def render(
        self, messages: Sequence[Message], tools: Any, generation: bool, variables: Mapping[str, Any]
    ) -> tuple[str, list[Span]]:
        """The text of messages, and what of it is marked; with ``generation``, marks are not asked for.

        Raises:
            Exception: Whatever the template raises.
        """
        given = self.special_tokens | dict(variables)
        messages = [_with_aliases(message) for message in messages]
        given |= {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": generation}
        with in_time():
            if self.has_marks and not generation:
                return render_with_marks(self._compiled, given)
            return str(self._compiled.render(given)), []

    def trace(self, messages: Sequence[Message], tools: Any, variables: Mapping[str, Any]) -> Trace | None:
        """The render of a conversation with those of its beginnings, or ``None`` where each is to be rendered alone."""
        try:
            if not self._can_be_traced:
                return None
            texts, ends = [], []
            for generation in (False, True):
                watched, length, pieces = _Watched(list(map(_with_aliases, messages))), 0, []
                given = self.special_tokens | dict(variables)
                given |= {"messages": watched, "tools": tools, "documents": None, "add_generation_prompt": generation}
                for piece in self._compiled.generate(given):
                    pieces.append(piece)
                    length += len(piece)
                    watched.seen.written = length
                begins = watched.seen.begins
                if len(begins) != len(messages) + 1:
                    return None
                whole = "".join(pieces)
                texts.append(whole[: begins[-1]])
                ends.append(whole[begins[-1] :])
        except TimeoutError:
            raise
        except Exception:  # the messages are no list here: what a template cannot do with them it does with a list
            return None
        return Trace(texts[0], begins, ends[1], ends[0]) if texts[0] == texts[1] else None


class _Seen:
    """How far a template has looked into the messages, and where in its text it took each."""

    def __init__(self) -> None:
        self.furthest = self.written = 0
        self.begins: list[int] = []

    def look(self, index: int) -> None:
        self.furthest = max(self.furthest, index)

    def take(self, index: int) -> None:
        """Message ``index`` is taken by the loop, or found to be missing."""
        while len(self.begins) < index:  # a loop over messages[1:] does not take the first
            self.begins.append(0)
        self.begins.append(self.written if self.furthest < max(1, index) else 0)


class _Watched(Sequence[Any]):
    """Messages that know who looks at them: a beginning of a conversation has no others."""

    def __init__(self, messages: Sequence[Message], seen: _Seen | None = None, offset: int = 0) -> None:
        self.messages, self.offset = messages, offset
        self.seen = seen or _Seen()

    def __bool__(self) -> bool:
        self.seen.look(self.offset)
        return bool(self.messages[self.offset :])

    def __len__(self) -> int:
        raise LookupError("the number of messages is that of the whole conversation")

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> _Watched: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            if index.stop is not None or index.step is not None or (index.start or 0) < 0:
                raise LookupError("a slice up to the last message")
            return _Watched(self.messages, self.seen, self.offset + (index.start or 0))
        if index < 0:
            raise LookupError("the last message")
        self.seen.look(self.offset + index)
        return self.messages[self.offset + index]

    def __iter__(self) -> Iterator[Any]:
        if self.seen.begins:
            raise LookupError("a second loop")
        for index in range(self.offset, len(self.messages)):
            self.seen.take(index)
            self.seen.look(index)
            yield self.messages[index]
        self.seen.take(len(self.messages))


def _goes_through_once(text: str) -> bool:
    """Whether a template is one loop over the messages that looks at none after its own, and an end that is always one.

    That is a sufficient condition: the loop stands at the top, or in a condition there; it does not ask whether a
    message is the last; and what follows it uses nothing that it has changed.
    """
    tree = template_environment().parse(text)
    derived = {"messages"}
    for node in tree.find_all(nodes.Assign):
        if isinstance(node.target, nodes.Name) and derived & _loaded(node.node):
            derived.add(node.target.name)
    loops = [node for node in tree.find_all(nodes.For) if derived & _loaded(node.iter)]
    after: list[nodes.Node] = []
    if len(loops) != 1 or loops[0].else_ or loops[0].recursive or not _find_at_top(tree.body, loops[0], after):
        return False
    [loop] = loops
    changed = {node.name for node in loop.find_all(nodes.NSRef)} | derived
    in_macros = {name for macro in tree.find_all(nodes.Macro) for name in _loaded(macro)}
    behind = set().union(*map(_loaded, after)) if after else set()
    asks_end = "add_generation_prompt" in _loaded(tree, but=after)
    return not (asks_end or changed & behind or changed & in_macros) and all(map(_looks_back, loop.body))


def _find_at_top(body: Sequence[nodes.Node], loop: nodes.For, after: list[nodes.Node]) -> bool:
    """Whether a loop stands in a body, or in a condition of it; collects what comes after it."""
    for number, node in enumerate(body):
        branches = (
            [node.body, *(branch.body for branch in node.elif_), node.else_] if isinstance(node, nodes.If) else []
        )
        if node is loop or any(_find_at_top(branch, loop, after) for branch in branches):
            after += body[number + 1 :]
            return True
    return False


def _loaded(tree: nodes.Node, but: Sequence[nodes.Node] = ()) -> set[str]:
    """The names that are read in a part of a template."""
    found = {tree.name} if isinstance(tree, nodes.Name) and tree.ctx == "load" else set()
    inner = (child for child in tree.iter_child_nodes() if not any(child is other for other in but))
    return found.union(*(_loaded(child, but) for child in inner))


def _looks_back(node: nodes.Node) -> bool:
    """Whether ``loop`` is only asked for what does not depend on the messages to come."""
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name) and node.node.name == "loop":
        return node.attr in _ONWARDS
    if isinstance(node, nodes.Name) and node.name == "loop":
        return False
    if isinstance(node, nodes.For):  # in there, it is another loop
        return _looks_back(node.iter)
    return all(map(_looks_back, node.iter_child_nodes()))


def _with_aliases(message: Message) -> Message:
    """As transformers hands a message on: without nulls, and its reasoning under the names that templates read."""
    if None not in message.values() and "reasoning_content" not in message:
        return message
    found = {key: value for key, value in message.items() if value is not None}
    reasoning = found.get("reasoning_content")
    return found if reasoning is None else {"thinking": reasoning, **found}


def _too_late(number: int, frame: Any) -> None:
    raise TimeoutError(f"the chat template has not rendered it after {MAX_SECONDS:g} s: look for a loop in it")


@lru_cache(maxsize=64)
def _frozen(template: str, day: date) -> str:
    """The template with ``strftime_now`` overridden to return only one date.

    A macro at the beginning hides the function of transformers however it is called or renamed, and is part of the text
    that names a cache's entry. The newline after it is trimmed, so what a template renders is otherwise the same.
    """
    if "strftime_now" not in template:
        return template
    codes = [flag + letter for flag in ("", *"-_0^#") for letter in ascii_letters]
    texts = {code: day.strftime(f"%{code}") for code in codes}
    known = json.dumps({code: text for code, text in texts.items() if text != f"%{code}"})
    return (
        f"{{% macro strftime_now(format) %}}{{% set known = {known} %}}{{% for part in format.split('%%') %}}"
        "{{ '' if loop.first else '%' }}{% for piece in part.split('%') %}"
        "{% if loop.first %}{{ piece }}{% elif piece[:2] in known %}{{ known[piece[:2]] }}{{ piece[2:] }}"
        "{% elif piece[:1] in known %}{{ known[piece[:1]] }}{{ piece[1:] }}{% else %}%{{ piece }}{% endif %}"
        f"{{% endfor %}}{{% endfor %}}{{% endmacro %}}\n{template}"
    )


@lru_cache(maxsize=8)
def refuse_random(template: str) -> None:
    """Refuse a template that would be rendered differently each time, as by ``random`` and ``lipsum`` of jinja2.

    Raises:
        InputError: Then.
    """
    if "random" in template or "lipsum" in template:
        tree = template_environment().parse(template)
        filters = {node.name for node in tree.find_all(nodes.Filter)}
        names = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
        if found := sorted(filters & {"random"} | names & {"lipsum"}):
            raise InputError(
                f"the chat template draws at random ({found[0]}), so no run could be repeated. Give another with "
                "data.chat_template."
            )
