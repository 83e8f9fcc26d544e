from __future__ import annotations

from typing import Any

import pytest

from lightning_sft.data.messages import ignored_keys, to_conversation
from lightning_sft.types import InputError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "Hi", "completion": "Yo"}, [USER, ANSWER]),
        ({"prompt": "Hi", "completion": "Yo", "system": "Be kind."}, [SYSTEM, USER, ANSWER]),
        ({"instruction": "Hi", "output": "Yo"}, [USER, ANSWER]),
        ({"instruction": "Hi", "input": "", "output": "Yo"}, [USER, ANSWER]),
        ({"instruction": "Hi", "input": "x", "output": "Yo"}, [{"role": "user", "content": "Hi\n\nx"}, ANSWER]),
        ({"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]}, [SYSTEM, USER, ANSWER, USER, ANSWER]),
    ],
)
def test_every_format_becomes_the_same_messages(row: dict[str, Any], messages: list[dict[str, str]]) -> None:
    conversation = to_conversation(row, "f:1")
    assert conversation.messages == messages
    assert conversation.weights == [float(m["role"] == "assistant") for m in messages]
    assert conversation.provenance == "f:1"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Hi", "reply": "Yo"}, r"f:1: the keys \['question', 'reply'\] are of no known format"),
        ({}, "of no known format"),
        ({"prompt": "Hi"}, "of no known format"),
        ({"prompt": "Hi", "completion": "Yo", "messages": [USER]}, "of several formats at once"),
        ({"prompt": 3, "completion": "Yo"}, "f:1: 'prompt' must be a string, got int 3"),
        ({"prompt": "Hi", "completion": None}, r"content of turn 2 \(assistant\) must be a string, got NoneType"),
        ({"instruction": "Hi", "input": ["x"], "output": "Yo"}, "'input' must be a string, got list"),
        ({"messages": "Hi"}, "f:1: 'messages' must be a list of .* got str 'Hi'"),
        ({"messages": []}, "'messages' must be a list"),
        ({"messages": ["Hi"]}, "turn 1 is str 'Hi'"),
        ({"messages": [{"role": "user"}]}, "turn 1 is dict"),
        ({"messages": [{"role": "user", "content": "Hi", "name": "A"}]}, "turn 1 is dict"),
        ({"messages": [{"role": "bot", "content": "Hi"}]}, "turn 1 has the role 'bot'"),
    ],
)
def test_what_is_no_conversation_is_one_error_that_says_what_was_expected(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_conversation(row, "f:1")


def test_keys_without_a_meaning_are_named() -> None:
    assert ignored_keys({"prompt": "Hi", "completion": "Yo", "id": 3, "input": "x"}) == {"id", "input"}


def test_for_generation_the_answer_may_be_missing() -> None:
    assert to_conversation({"prompt": "Hi"}, answered=False).messages == [USER]
