"""What a template makes of an answer of a certain shape, learnt by rendering it with a sentinel in each field.

An answer has fields: its text, its reasoning, and of each tool call the name and every key and value of its arguments.
A template may drop one, as most drop the reasoning, and looking for the field's own text in the render would not show
that where the text stands there twice. Sentinels do: each is a text that stands nowhere else.

What follows the last sentinel is how the template ends an answer. Rendered again with a further turn, it shows
which part of this belongs to the answer, and which to whatever comes next. What generation stops at is in the former;
or, where a template puts nothing after an answer, it is what begins the next turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import escape

from lightning_sft.types import Message

Shape = tuple[Any, ...]


@dataclass(frozen=True)
class Answer:
    """One trained turn as text.

    Args:
        text: A text that has the turn and all before it; turns may share one.
        begin: Where the turn begins, and its prompt ends.
        end: Where it ends, with its stop token.
        trained: Where what is trained of it begins.
    """

    text: str
    begin: int
    end: int
    trained: int

    @property
    def own(self) -> str:
        """The text of the turn."""
        return self.text[self.begin : self.end]


@dataclass(frozen=True)
class Ending:
    """How a template writes answers of a shape.

    Args:
        lost: Names of the fields that are not in its render.
        tail: What follows the last field in a conversation that ends with the answer.
        stop: What follows it up to and with the stop token; empty where there is none.
        before: What stands between the prompt and the first field.
        header: The end of the prompt, where the template writes what is before it in another way.
        between: What stands between the reasoning and the next field; empty without a reasoning.
    """

    lost: tuple[str, ...] = ()
    tail: str = ""
    stop: str = ""
    before: str = ""
    header: str = ""
    between: str = ""

    @property
    def stops_at_next(self) -> bool:
        """Whether what stops the answer begins the next turn."""
        return bool(self.stop) and not self.tail.startswith(self.stop)


@dataclass(frozen=True)
class Stops:
    """What is known of a template's stop tokens before one is learnt.

    Args:
        pattern: Matches an added token that may end or begin a turn.
        known: Tokens that generation stops at, by the tokenizer, the model's generation config and plain answers.
        opener: Token that begins the turn of an answer; empty where that is not known.
        always_prompts: Whether the template ends any conversation with the prompt of the next answer.
        plain: How plain answers end; ``None`` while that is learnt.
    """

    pattern: re.Pattern[str]
    known: Collection[str]
    opener: str = ""
    always_prompts: bool = False
    plain: Ending | None = None


@dataclass
class Sentinels:
    """An answer in which each field has a text of its own.

    Args:
        message: The answer.
        fields: Name of each field, by the text that it has now, in order.
        first: Number of the first sentinel.
    """

    message: Message
    fields: dict[str, str] = field(default_factory=dict)
    first: int = 0


def shape_of(message: Message) -> Shape:
    """All of an answer but the texts and numbers in it."""
    calls = message.get("tool_calls")
    structures = tuple([_structure(call["function"].get("arguments")) for call in calls]) if calls else ()
    return _has(message, "reasoning_content"), _has(message, "content"), structures


def is_empty(message: Message) -> bool:
    """Whether an answer says nothing and calls nothing."""
    return not (_has(message, "content") or message.get("tool_calls") or _has(message, "reasoning_content"))


def _has(message: Message, key: str) -> bool:
    text = message.get(key)
    return bool(text and not text.isspace())


def with_sentinels(message: Message, first: int = 0) -> Sentinels:
    """An answer of the same shape with a sentinel in each field, of which the first has a number.

    >>> with_sentinels({"role": "assistant", "content": "Hi"})
    Sentinels(message={'role': 'assistant', 'content': 'Xq0000qX'}, fields={'Xq0000qX': 'the text'}, first=0)
    """
    made = Sentinels(dict(message), first=first)
    for key, name in (("reasoning_content", "the reasoning"), ("content", "the text")):
        if (message.get(key) or "").strip():
            made.message[key] = _sentinel(made, name)
    if message.get("tool_calls"):
        calls = []
        for number, call in enumerate(message["tool_calls"], 1):
            function = {**call["function"], "name": _sentinel(made, f"the name of tool call {number}")}
            if "arguments" in function:
                function["arguments"] = _marked(function["arguments"], made, f"an argument of tool call {number}")
            calls.append({**call, "function": function})
        made.message["tool_calls"] = calls
    return made


def learn(answer: Sentinels, prompt: str, whole: str, onwards: str | None, stops: Stops) -> Ending:
    """How a template ends an answer.

    Args:
        answer: The answer, with sentinels.
        prompt: What stands before it at inference.
        whole: The conversation up to and with the answer.
        onwards: Conversation with a further turn, up to the text of that turn; ``None`` where the template has none.
        stops: What is known of stop tokens.
    """
    begin = len(prompt) if whole.startswith(prompt) else 0
    places = {text: whole.find(text, begin) for text in answer.fields}
    lost = tuple(dict.fromkeys(name for text, name in answer.fields.items() if places[text] < 0))
    found = sorted((place, text) for text, place in places.items() if place >= 0)
    if not found:
        return Ending(lost)
    end = max(whole.rfind(text) + len(text) for _, text in found)  # a field may be written twice
    tail, last_words = whole[end:], whole[max(begin, end - 64) : end]
    first, header, between = found[0][0], "", ""
    if not begin:
        tokens = list(stops.pattern.finditer(prompt))
        header = prompt[tokens[-1].start() :] if tokens else ""
        header = header if header in whole[:first] else ""
        begin = whole.rfind(header, 0, first) + len(header) if header else first
    if len(found) > 1 and answer.fields[found[0][1]] == "the reasoning":
        between = whole[found[0][0] + len(found[0][1]) : found[1][0]]
    after = "" if onwards is None else onwards.partition(last_words)[2]
    return Ending(lost, tail, _stop(tail, after, stops), whole[begin:first], header, between)


def _stop(tail: str, after: str, stops: Stops) -> str:
    """What follows an answer, up to and with the token that stops it; empty where none does."""
    shared = num_shared(tail, after) if after else len(tail)
    tokens = list(stops.pattern.finditer(tail))
    known = [token for token in tokens if token.group() in stops.known]
    if known and known[0].end() <= shared:
        return tail[: known[0].end()]
    own = tail.partition(stops.opener)[0] if stops.opener else tail  # behind that, another turn has begun
    tokens, known = ([token for token in some if token.end() <= len(own)] for some in (tokens, known))
    closing = [token for token in tokens if token.end() <= shared]
    if known and (stops.plain or not closing):
        return own[: known[0].end()]
    if closing:  # of a template that always ends with a prompt, the next turn may begin behind the first one
        return own[: closing[0 if stops.always_prompts else -1].end()]
    if tokens:
        return own[: tokens[-1].end()]
    token = stops.pattern.search(after)
    if token and after[: token.start()].rstrip() == own.rstrip() and (stops.plain is None or stops.plain.stops_at_next):
        return after[: token.end()]
    return ""


def num_shared(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning.

    >>> num_shared("abcd", "abxd"), num_shared("ab", "abc")
    (2, 2)
    """
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def but_for_space(left: str, rest: str) -> str | None:
    r"""What follows in one text on another, which it begins with but for space; ``None`` where it does not.

    >>> but_for_space("<a>\n<b>\n", "   <a> <b>\n  yes"), but_for_space("<a>", "<b>")
    ('  yes', None)
    """
    found = re.match(r"\s*".join(["", *map(re.escape, "".join(left.split()))]), rest)
    return found and rest[found.end() :].removeprefix(left[len(left.rstrip()) :])


def values_in(value: Any) -> Iterator[Any]:
    """Every key and value in nested lists and mappings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from values_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from values_in(inner)
    else:
        yield value


def value_of(field: str, message: Message) -> str:
    """What a message has in a field that :func:`with_sentinels` names; arguments are named."""
    for number, call in enumerate(message.get("tool_calls") or (), 1):
        if field == f"the name of tool call {number}":
            return f"the tool call {short(call['function']['name'])}"
    found = {"the reasoning": message.get("reasoning_content"), "the text": message.get("content")}
    value = found.get(field)
    return short(value.strip()) if value else field


def short(text: str) -> str:
    """A text in quotes, cut where it is long."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


def is_written(value: Any, text: str) -> bool:
    """Whether a value of an argument stands in a text, in one of the ways in which templates write values."""
    if not isinstance(value, str):
        return True  # that numbers are written at all, the sentinels have shown
    ways: tuple[Callable[[str], str], ...] = (
        str,
        lambda own: json.dumps(own, ensure_ascii=False)[1:-1],
        lambda own: json.dumps(own)[1:-1],
        lambda own: repr(own)[1:-1],
        lambda own: repr(f'"{own}')[2:-1],  # single quotes escaped
        lambda own: str(htmlsafe_json_dumps(own))[1:-1],
        escape,
        str.strip,
    )
    return any(way(value) in text for way in ways)


def sentinel_text(number: int) -> str:
    """The text of a sentinel, which stands nowhere else."""
    return f"Xq{number:04d}qX"


def _sentinel(made: Sentinels, name: str, kind: type = str) -> Any:
    number = made.first + len(made.fields)
    value: Any = sentinel_text(number) if kind is str else kind(70_413_000 + number) + (0.5 if kind is float else 0)
    made.fields[str(value)] = name
    return value


def _marked(value: Any, made: Sentinels, name: str) -> Any:
    if isinstance(value, Mapping):
        names = [_sentinel(made, name) for _ in value]  # in the order of the keys, since some templates sort them
        return {names[rank]: _marked(value[key], made, name) for key, rank in zip(value, _ranks(value), strict=True)}
    if isinstance(value, (list, tuple)):
        return [_marked(inner, made, name) for inner in value]
    if isinstance(value, bool) or value is None or value == "":
        return value
    return _sentinel(made, name, type(value) if type(value) in (int, float) else str)


def _ranks(keys: Collection[str]) -> list[int]:
    """The place of each key among them all, sorted as by jinja2's ``dictsort``."""
    ordered = sorted(keys, key=str.lower)
    return [ordered.index(key) for key in keys]


def _structure(value: Any) -> Any:
    if isinstance(value, Mapping):
        return "{", *zip(_ranks(value), map(_structure, value.values()), strict=True)
    if isinstance(value, (list, tuple)):
        return "[", *map(_structure, value)
    return value if isinstance(value, bool) or value is None or value == "" else type(value).__name__
