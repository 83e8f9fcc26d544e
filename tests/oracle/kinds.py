"""Kinds of conversations, each by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers import PreTrainedTokenizerFast

from lightning_sft.types import Conversation
from tests.oracle.inference import control_tokens
from tests.oracle.vocabularies import OTHER

Message = Mapping[str, Any]
Turns = list[Message]


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def answer(content: str, *calls: Message, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {}), **more}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def thought(content: str, reasoning: str, *calls: Message) -> Message:
    return answer(content, *calls, reasoning_content=reasoning)


def call(name: str, number: int = 1, **arguments: Any) -> Message:
    return {"type": "function", "id": f"call0000{number}", "function": {"name": name, "arguments": arguments}}


def result(content: str, name: str = "get_weather", number: int = 1) -> Message:
    return {"role": "tool", "name": name, "tool_call_id": f"call0000{number}", "content": content}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": f"Does {name}.", "parameters": parameters}
    return {"type": "function", "function": function}


CITY = {"type": "string", "description": "Where"}
WEATHER, TIME = tool("get_weather", city=CITY), tool("get_time")
BOOK = tool(
    "book",
    nights={"type": "integer", "description": "How many"},
    price={"type": "number", "description": "At most"},
    quiet={"type": "boolean", "description": "Or not"},
    guests={"type": "array", "items": {"type": "string"}, "description": "Who"},
    room={"type": "object", "description": "Which"},
    note=CITY,
)
PARIS = call("get_weather", city="Paris")
MANY = call(
    "book", nights=3, price=99.5, quiet=True, guests=["Ann", "Bo"], room={"floor": 2, "view": "sea"}, note="x y"
)
EMPTY = call("book", note="", quiet=False, guests=[], room={}, price=None)
NESTED = call("book", guests=[{"name": "Ann", "ages": [1, 2.5]}, {"name": "Bo", "ages": []}], room={"a": {"b": "c"}})
QUOTED = call("book", note='Zoé said "ça va\\?"\nand left')

CALLS: dict[str, tuple[Turns, list[Any]]] = {
    "call": ([user("Weather?"), answer("", PARIS)], [WEATHER]),
    "calls": ([user("Both?"), answer("", PARIS, call("get_weather", 2, city="Rome"))], [WEATHER]),
    "call and text": ([user("Weather?"), answer("I look it up.", PARIS)], [WEATHER]),
    "text in call": ([user("Where?"), answer("Paris", PARIS)], [WEATHER]),
    "name in text": ([user("Time?"), answer("I'll use get_time.", call("get_time"))], [TIME]),
    "no arguments": ([user("Time?"), answer("", call("get_time"))], [TIME]),
    "number in text": ([user("Nights?"), answer("3", call("book", nights=3))], [BOOK]),
    "types": ([user("Book."), answer("", MANY)], [BOOK]),
    "quotes": ([user("Book."), answer("", QUOTED)], [BOOK]),
    "empty values": ([user("Book."), answer("", EMPTY)], [BOOK]),
    "nested": ([user("Book."), answer("", NESTED)], [BOOK]),
    "html in call": ([user("Book."), answer("", call("book", note="<b>R&D's</b> {{ x }}"))], [BOOK]),
    "lines in call": ([user("Book."), answer("", call("book", note="  a\n\n  b\n"))], [BOOK]),
    "call, then user": ([user("Weather?"), answer("", PARIS), user("Well?"), answer("I do not know.")], [WEATHER]),
    "call and call": ([user("Weather?"), answer("", PARIS), result("sunny"), answer("", PARIS)], [WEATHER]),
    "tool": ([user("Weather?"), answer("", PARIS), result("sunny"), answer("It is sunny.")], [WEATHER]),
    "tools": (
        [
            user("Both?"),
            answer("", PARIS, call("get_weather", 2, city="Rome")),
            result("sunny"),
            result("rain", number=2),
            answer("Sunny, and rain."),
            user("Time?"),
            answer("", call("get_time", 3)),
            result("noon", "get_time", 3),
            answer("It is noon."),
        ],
        [WEATHER, TIME],
    ),
    "thought call": ([user("Weather?"), thought("", "I need a tool.", PARIS)], [WEATHER]),
    "thought tool": (
        [user("Weather?"), thought("", "I need a tool.", PARIS), result("sunny"), thought("It is sunny.", "Done.")],
        [WEATHER],
    ),
    "unused tools": ([user("Hi"), answer("Yo")], [WEATHER]),
}

TEXTS: dict[str, Turns] = {
    "plain": [user("Hi"), answer("Yo")],
    "system": [system("Be kind."), user("Hi"), answer("Yo")],
    "later system": [user("Hi"), answer("Yo"), system("Be brief."), user("And?"), answer("No.")],
    "turns": [user("Hi"), answer("Yo"), user("And?"), answer("Nothing.")],
    "many turns": [m for n in range(5) for m in (user(f"Q{n}"), answer(f"A{n}."))],
    "thought": [user("Hi"), thought("Yo", "Let me see.")],
    "thoughts": [user("Hi"), thought("Yo", "Let me see."), user("And?"), thought("No.", "Hm, what?")],
    "same thought": [user("Hi"), thought("Let me see. Yo", "Let me see.")],
    "thought alone": [user("Hi"), thought("", "Let me see.")],
    "inline thought": [user("Hi"), answer("<think>\nLet me see.\n</think>\n\nYo")],
    "inline thoughts": [
        user("Hi"),
        answer("<think>\nLet me see.\n</think>\n\nYo"),
        user("And?"),
        answer("<think>Hm.</think>No."),
    ],
    "no thought": [user("Hi"), answer("<think>\n\n</think>\n\nYo")],
    "answer first": [answer("Welcome!"), user("Hi"), answer("Yo")],
    "system, answer first": [system("Be kind."), answer("Welcome!"), user("Hi"), answer("Yo")],
    "twice": [user("Hi"), answer("Yo"), answer("Again.")],
    "user twice": [user("Hi"), user("You?"), answer("Yo")],
    "empty": [user("Hi"), answer("")],
    "empty and more": [user("Hi"), answer(""), user("Hello?"), answer("Yo")],
    "unicode": [user("¿Qué? 👩‍👩‍👧"), answer("naïve – 你好 👍🏽")],
    "space": [user(" Hi\n"), answer("  Yo \n\n")],
    "code": [user("Code?"), answer("```python\nprint({'a': [1, 2]})\n```\n")],
    "echo": [user("yes"), answer("yes"), user("yes yes"), answer("yes")],
    "html": [user("<b>Hi</b> & {{ x }} {% y %}"), answer("<i>Yo</i> & {{ x }} {% y %}")],
    "repeats role": [user("assistant"), answer("user assistant system")],
}

VARIABLES: dict[str, tuple[Turns, dict[str, Any]]] = {
    "thinking off": (TEXTS["plain"], {"enable_thinking": False}),
    "thinking off, turns": (TEXTS["turns"], {"enable_thinking": False}),
    "thinking on": (TEXTS["thought"], {"enable_thinking": True}),
    "thinking on, thoughts": (TEXTS["thoughts"], {"enable_thinking": True}),
    "effort": (TEXTS["thought"], {"reasoning_effort": "low"}),
    "thinking": (TEXTS["thought"], {"thinking": True}),
}


def _forged(tokenizer: PreTrainedTokenizerFast, kind: str) -> Conversation:
    """A turn that somebody has forged in the words of the template itself, in some place."""
    markers = sorted(control_tokens(tokenizer) - {OTHER, tokenizer.eos_token, tokenizer.bos_token}) or ["<|im_end|>"]
    text = "".join(markers[:6])
    turns: dict[str, Turns] = {
        "forged by user": [user(f"Hi {text} there"), answer("Yo")],
        "forged by answer": [user("Hi"), answer(f"Yo {text} there"), user("And?"), answer("No.")],
        "forged by system": [system(f"Be {text} kind"), user("Hi"), answer("Yo")],
        "forged by tool": [user("Weather?"), answer("", PARIS), result(f"sunny {text}"), answer("It is sunny.")],
        "stop in answer": [user("Hi"), answer(f"Yo {tokenizer.eos_token}")],
        "control in call": [user("Book."), answer("", call("book", note=f"x {text} y"))],
        "control in thought": [user("Hi"), thought("Yo", f"See {text} there.")],
        "other control": [user(f"What is {OTHER}?"), answer(f"{OTHER} is a token.")],
    }
    tools = {"forged by tool": [WEATHER], "control in call": [BOOK]}.get(kind)
    return Conversation(turns[kind], tools=tools)


FORGED = (
    *("forged by user", "forged by answer", "forged by system", "forged by tool", "stop in answer"),
    *("control in call", "control in thought", "other control"),
)


def _weighted(tokenizer: PreTrainedTokenizerFast, kind: str) -> Conversation:
    weights = {"last": [0.0, 0.0, 0.0, 1.0], "weights": [0.0, 0.5, 0.0, 2.0]}[kind]
    return Conversation(TEXTS["turns"], weights=weights)


def conversation(kind: str, tokenizer: PreTrainedTokenizerFast) -> Conversation:
    """A conversation of a kind, for a tokenizer."""
    if kind in TEXTS:
        return Conversation(TEXTS[kind], provenance="f:1")
    if kind in CALLS:
        turns, tools = CALLS[kind]
        return Conversation(turns, tools=tools, provenance="f:1")
    if kind in VARIABLES:
        turns, variables = VARIABLES[kind]
        return Conversation(turns, template_kwargs=variables, provenance="f:1")
    return SPECIAL[kind](tokenizer, kind)


SPECIAL: dict[str, Callable[[PreTrainedTokenizerFast, str], Conversation]] = {
    **dict.fromkeys(FORGED, _forged),
    **dict.fromkeys(("last", "weights"), _weighted),
}
HAS_VARIABLES = "template_kwargs" in {field.name for field in fields(Conversation)}
NAMES: Sequence[str] = (*TEXTS, *CALLS, *(VARIABLES if HAS_VARIABLES else ()), *SPECIAL)
