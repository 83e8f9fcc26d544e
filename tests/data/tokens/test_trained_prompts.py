"""Turns of others that are trained: what the template adds for them, and nothing of its own that stands before."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_sft.data.tokens.encode import encode
from lightning_sft.types import Conversation, Message
from tests.oracle.templates import of_trl
from tests.oracle.vocabularies import tokenizer_for

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
FIRST = {
    "qwen2_5": "<|im_start|>user\nHi<|im_end|>",
    "qwen3": "<|im_start|>user\nHi<|im_end|>",
    "gemma3": "<start_of_turn>user\nHi<end_of_turn>",
    "llama3_1": "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
}


@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("name", FIRST)
def test_of_a_first_turn_neither_the_templates_system_turn_nor_tools_are_trained(name: str, tools: Any) -> None:
    tokenizer = tokenizer_for(of_trl()[name])
    turns: list[Message] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    first, *_ = encode(Conversation(turns, tools=tools, weights=[1.0, 0.0]), tokenizer)
    trained = tokenizer.decode([i for i, w in zip(first.input_ids, first.target_weights, strict=True) if w > 0])
    if name == "llama3_1" and tools:  # this template writes the tools into the first turn of the user
        assert trained == "Hi<|eot_id|>"
    else:
        is_first = (
            first.input_ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>") and name == "qwen3" and not tools
        )
        assert trained == FIRST[name].removeprefix("<|im_start|>" if is_first else "")  # which has no context


def test_a_first_turn_without_text_is_trained_with_its_header() -> None:
    tokenizer = tokenizer_for(of_trl()["qwen2_5"])
    turns: list[Message] = [{"role": "user", "content": ""}, {"role": "assistant", "content": "Hello!"}]
    [row] = encode(Conversation(turns, weights=[1.0, 0.0]), tokenizer)
    trained = tokenizer.decode([i for i, w in zip(row.input_ids, row.target_weights, strict=True) if w > 0])
    assert trained == "<|im_start|>user\n<|im_end|>"
