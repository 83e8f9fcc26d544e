"""Whatever is done to a row, it ends as a conversation or as one clean error."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

from lightning_sft.data.rows.messages import Converter
from lightning_sft.data.rows.sources import read
from lightning_sft.types import Conversation, Example, InputError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "loss": True, "weight": 0.5}
CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
PARTS = [
    {"type": "reasoning", "value": "Hm"},
    {"type": "text", "text": "Yo"},
    {"type": "tool_call", "value": '{"name": "weather", "arguments": {}}'},
]
TEXT = {"type": "text", "text": "Hi"}
OBSERVED = {"role": "tool", "tool_call_id": "c", "name": "weather", "content": "21"}
ROWS: list[Any] = [
    {"prompt": "Hi", "completion": "Yo", "system": "Be kind.", "weight": 2},
    {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
    {"instruction": "Hi", "input": "x", "output": "Yo"},
    {"messages": [USER, ANSWER], "weight": 1, "id": 3},
    [USER, ANSWER],
    {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, OBSERVED, ANSWER],
        "tools": TOOLS,
    },
    {"messages": [USER, {"role": "assistant", "content": PARTS}], "tools": json.dumps(TOOLS)},
    {"messages": [USER, {**ANSWER, "reasoning_content": "Hm"}]},
    {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'},
            {"from": "observation", "value": "21"},
            {"from": "gpt", "value": "Yo"},
        ],
        "system": "Be kind.",
        "tools": json.dumps(TOOLS),
    },
    {"text": "Once upon a time"},
    {"instruction": "Hi", "context": "x", "response": "Yo", "history": [["Hi", "Yo"]], "reasoning_content": "Hm"},
    {"query": "Hi", "answers": '[{"name": "weather", "arguments": {}}]', "chat_template_kwargs": {"mood": 1}},
    {"messages": json.dumps([USER, ANSWER]), "functions": [TOOLS[0]["function"]]},
    {"conversation": [{"system": "Be kind.", "input": "Hi", "output": "Yo"}, {"human": "Hi", "assistant": "Yo"}]},
    {"conversations": ["Hi", "Yo"], "label": None, "images": []},
    {
        "messages": [
            {"role": "prompter", "text": "Hi", "timestamp": 3},
            {"speaker": "bot", "text": "", "function_call": {"name": "weather", "arguments": "{}"}},
            {"role": "function", "name": "weather", "content": {"degrees": [21, None]}},
            ANSWER,
        ]
    },
    {
        "messages": [
            {"role": "user", "content": [{**TEXT, "cache_control": {"type": "ephemeral"}}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm", "signature": "x"},
                    {"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "Rome"}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "2"}]}],
            },
            ANSWER,
        ]
    },
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "loss_mask": [0, 1, 0.5], "attention_mask": [1, 1, 1]},
    {"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": "No"},
    {"prompt": "Hi", "completion": "Yo", "label": True},
]


def places(value: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """The containers within a value, each with each of its keys; not those that are very deep."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, inner in items if depth < 12 for p in [(value, key), *places(inner, depth + 1)]]


def as_text(value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        return type(value).__name__


def nested(r: Random) -> Any:
    value: Any = "x"
    for _ in range(r.choice((3, 70, 500))):
        value = [value] if r.random() < 0.5 else {"a": value}
    return value


def anything(r: Random) -> Any:
    values: list[Callable[[], Any]] = [
        *(
            lambda v=v: v
            for v in (None, True, 0, -1, 1e308, math.nan, math.inf, 10**5000, "", "x\ud800", b"x", {1}, 1j)
        ),
        lambda: {},
        lambda: [],
        lambda: [[]],
        lambda: {r.choice(("role", "type", "function", "value", "a")): "x"},
        lambda: nested(r),
        lambda: json.dumps(r.choice(ROWS))[: r.randrange(200)],
        lambda: "[" * 5000,
        lambda: "\\" * r.randrange(9) + '"',
        lambda: [deepcopy(r.choice(ROWS))],
        object,
    ]
    return r.choice(values)()


def corrupt(row: Any, r: Random) -> Any:
    """The row with up to four things done to it."""
    row = deepcopy(row)
    for _ in range(r.randrange(1, 5)):
        found = places(row)
        if not found or r.random() < 0.01:
            return anything(r)
        container, key = r.choice(found)
        kind = r.randrange(5)
        if kind == 0:
            del container[key]
        elif kind == 1:
            container[key] = None
        elif kind == 2 and isinstance(container, dict):  # rename, or take the place of another
            other = r.choice([*container, "content", "value", "from", "thinking", "weight", "text", "a", 3, ("b",)])
            container[other] = container.pop(key)
        elif kind == 3:
            container[key] = as_text(container[key]) if r.random() < 0.5 else [container[key]]
        else:
            container[key] = anything(r)
    return row


def check(conversation: Conversation) -> None:
    assert len(conversation.messages) == len(conversation.weights) > 0
    assert all(0 <= weight < math.inf for weight in conversation.weights)
    assert {m["role"] for m in conversation.messages} <= {"system", "user", "assistant", "tool", "text"}
    assert all(isinstance(m["content"], str) for m in conversation.messages)
    json.dumps(
        [conversation.messages, conversation.tools, dict(conversation.template_kwargs)],
        allow_nan=False,
        ensure_ascii=False,
    ).encode()


def check_ids(example: Example) -> None:
    assert len(example.input_ids) == len(example.target_weights) > 1
    assert min(example.input_ids) >= 0
    assert example.target_weights[0] == 0 < max(example.target_weights) < math.inf
    assert min(example.target_weights) == 0


def outcome(rows: Iterable[tuple[Any, str]], place: str, answered: bool = True) -> str:
    try:
        for row, provenance in rows:
            read = Converter(answered=answered).read(row, provenance)
            check_ids(read) if isinstance(read, Example) else check(read)
    except InputError as error:
        return "refused" if str(error).startswith(place) and len(str(error)) < 1000 else str(error)
    return "used"


def test_ten_thousand_corrupted_rows_end_cleanly() -> None:
    r, outcomes = Random(0), Counter[str]()
    for number in range(10_000):
        row = corrupt(r.choice(ROWS), r)
        outcomes[outcome([(row, f"f:{number}")], f"f:{number}: ", answered=r.random() < 0.5)] += 1
    assert outcomes.keys() == {"used", "refused"}
    assert min(outcomes.values()) > 1000  # both happen often, so both are tested


def test_corrupted_text_ends_cleanly(tmp_path: Path) -> None:
    r, outcomes = Random(0), Counter[str]()
    texts = [json.dumps(row).encode() for row in ROWS]
    for number in range(2_000):
        text = bytearray(r.choice(texts))
        begin, end = sorted(r.randrange(len(text)) for _ in range(2))
        kind = r.randrange(4)
        if kind == 0:
            del text[begin:]
        elif kind == 1:
            text[begin] = r.randrange(256)
        elif kind == 2:
            text[begin:begin] = text[begin:end]
        else:
            text[:0] = b"[" * r.choice((1, 5_000))
        path = tmp_path / f"{number}{r.choice(('.jsonl', '.json'))}"
        path.write_bytes(text)
        outcomes[outcome(read(path), str(path))] += 1
    assert outcomes.keys() == {"used", "refused"}
