"""Turns of others that are trained: what the template adds for them, and nothing of its own that stands before."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_sft.data.tokens.encode import encode
from lightning_sft.types import Conversation, Message
from tests.oracle.templates import of_trl
from tests.oracle.vocabularies import tokenizer_for

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CHATML, GEMMA = "<|im_start|>user\nHi<|im_end|>", "<start_of_turn>user\nHi<end_of_turn>"


@pytest.mark.parametrize(
    ("name", "tools", "wanted"),
    [
        ("qwen2_5", None, CHATML),
        ("qwen2_5", [TOOL], CHATML),
        ("qwen3", None, CHATML.removeprefix("<|im_start|>")),  # the first token has no context
        ("qwen3", [TOOL], CHATML),
        ("gemma3", None, GEMMA),
        ("gemma3", [TOOL], GEMMA),
        ("llama3_1", None, "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"),
        ("llama3_1", [TOOL], "Hi<|eot_id|>"),  # which writes the tools into that turn
    ],
)
def test_of_a_first_turn_neither_the_templates_system_turn_nor_tools_are_trained(
    name: str, tools: Any, wanted: str
) -> None:
    turns: list[Message] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    assert trained(name, Conversation(turns, tools=tools, weights=[1.0, 0.0])) == wanted


def test_a_first_turn_without_text_is_trained_with_its_header() -> None:
    turns: list[Message] = [{"role": "user", "content": ""}, {"role": "assistant", "content": "Hello!"}]
    assert trained("qwen2_5", Conversation(turns, weights=[1.0, 0.0])) == "<|im_start|>user\n<|im_end|>"


def trained(name: str, conversation: Conversation) -> str:
    """The text of the targets of the first sequence."""
    tokenizer = tokenizer_for(of_trl()[name])
    first, *_ = encode(conversation, tokenizer)
    pairs = zip(first.input_ids, first.target_weights, strict=True)
    return str(tokenizer.decode([token for token, weight in pairs if weight > 0]))
