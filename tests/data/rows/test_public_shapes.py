"""Rows in the shapes of public data sets go in as they are, or are refused for what they are.

The keys are those of the data sets; the texts are made up.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from lightning_sft.data.rows.messages import Converter, Reading
from lightning_sft.types import Conversation, InputError

HI, YO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
KIND = {"role": "system", "content": "Be kind."}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}
ROME = {"city": "Rome"}
CALL = {"name": "weather", "arguments": ROME}
CALLING = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
TOOLS = [{"name": "weather", "description": "Weather.", "parameters": {"city": {"type": "str", "default": "Rome"}}}]

SHAPES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "tatsu-lab/alpaca": ({"instruction": "Hi", "input": "", "output": "Yo", "text": "... Hi ... Yo"}, [HI, YO]),
    "databricks-dolly-15k": ({"instruction": "Hi", "context": "", "response": "Yo", "category": "open_qa"}, [HI, YO]),
    "GAIR/lima": ({"conversations": ["Hi", "Yo"], "source": "stackexchange"}, [HI, YO]),
    "HuggingFaceH4/no_robots": ({"prompt": "Hi", "prompt_id": "1", "messages": [HI, YO], "category": "Chat"}, [HI, YO]),
    "HuggingFaceH4/ultrachat_200k": ({"prompt": "Hi", "prompt_id": "1", "messages": [HI, YO]}, [HI, YO]),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {
            **{"prompt": "Hi", "prompt_id": "1", "messages": [HI, YO], "score_chosen": 8.0, "score_rejected": 3.0},
            **{"chosen": [HI, YO], "rejected": [HI, {**YO, "content": "No"}]},
        },
        [HI, YO],
    ),
    "lmsys/lmsys-chat-1m": ({"conversation": [HI, YO], "model": "vicuna", "turn": 1, "redacted": False}, [HI, YO]),
    "allenai/WildChat": (
        {
            "conversation": [
                {**HI, "country": "Italy", "hashed_ip": "x", "header": {"accept-language": "it"}, "toxic": False},
                {**YO, "turn_identifier": 3, "timestamp": "2024-01-01", "language": "English", "redacted": False},
            ],
            "model": "gpt-4",
        },
        [HI, YO],
    ),
    "LDJnr/Capybara": ({"source": "x", "conversation": [{"input": "Hi", "output": "Yo"}]}, [HI, YO]),
    "teknium/OpenHermes-2.5": ({"conversations": [HUMAN, {**GPT, "weight": None}], "source": "x"}, [HI, YO]),
    "Open-Orca/SlimOrca": (
        {"conversations": [{"from": "system", "value": "Be kind.", "weight": None}, {**HUMAN, "weight": 0}, GPT]},
        [KIND, HI, YO],
    ),
    "allenai/tulu-3-sft-mixture": ({"id": "1", "messages": [HI, YO], "source": "ai2"}, [HI, YO]),
    "HuggingFaceTB/smoltalk2": (
        {"messages": [HI, YO], "chat_template_kwargs": {"enable_thinking": False, "python_tools": []}, "source": "x"},
        [HI, YO],
    ),
    "open-thoughts/OpenThoughts-114k": (
        {
            "system": "Be kind.",
            "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "<think>Hm</think>Yo"}],
        },
        [KIND, HI, {**YO, "content": "<think>Hm</think>Yo"}],
    ),
    "open-r1/OpenR1-Math-220k": ({"problem": "Hi", "solution": "Yo", "answer": "Y", "messages": [HI, YO]}, [HI, YO]),
    "meta-math/MetaMathQA": ({"type": "GSM", "query": "Hi", "original_question": "Hi", "response": "Yo"}, [HI, YO]),
    "Salesforce/xlam-function-calling-60k": (
        {"id": 0, "query": "Hi", "answers": json.dumps([CALL]), "tools": json.dumps(TOOLS)},
        [HI, CALLING],
    ),
    "Salesforce/APIGen-MT-5k": (
        {
            "conversations": [
                *[HUMAN, {"from": "function_call", "value": json.dumps(CALL)}],
                *[{"from": "observation", "value": '{"degrees": 21}'}, GPT],
            ],
            "tools": json.dumps(TOOLS),
            "system": "Be kind.",
        },
        [KIND, HI, CALLING, {"role": "tool", "content": '{"degrees": 21}'}, YO],
    ),
    "Team-ACE/ToolACE": (
        {
            "system": "Be kind.",
            "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yo"}],
        },
        [KIND, HI, YO],
    ),
    "NousResearch/hermes-function-calling-v1": (
        {
            "id": "1",
            "conversations": [
                *[{"from": "system", "value": "Be kind."}, HUMAN, GPT],
                *[{"from": "tool", "value": "21"}, GPT],
            ],
            "tools": json.dumps([{"type": "function", "function": TOOLS[0]}]),
            "category": "x",
        },
        [KIND, HI, YO, {"role": "tool", "content": "21"}, YO],
    ),
    "Agent-Ark/Toucan-1.5M": (
        {"messages": json.dumps([KIND, HI, {"role": "tool_call", "content": json.dumps(CALL)}, YO]), "tools": "[]"},
        [KIND, HI, CALLING, YO],
    ),
    "FastChat": (
        {"id": "1", "conversations": [{"from": "user", "value": "Hi"}, {"from": "chatgpt", "value": "Yo"}]},
        [HI, YO],
    ),
    "the chat format of OpenAI, before tools": (
        {
            "messages": [HI, {**YO, "content": None, "function_call": {**CALL, "arguments": json.dumps(ROME)}}],
            "functions": TOOLS,
        },
        [HI, CALLING],
    ),
    "the messages of Anthropic": (
        {
            "system": "Be kind.",
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": ROME}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "21"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Yo"}]},
            ],
            "tools": [{"name": "weather", "input_schema": {"type": "object"}}],
        },
        [
            *[KIND, HI, {**CALLING, "tool_calls": [{"id": "t1", "type": "function", "function": CALL}]}],
            *[{"role": "tool", "content": "21", "tool_call_id": "t1"}, YO],
        ],
    ),
    "the contents of Gemini": (
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "Be kind."}]},
            "contents": [
                {"role": "user", "parts": [{"text": "Hi"}]},
                {"role": "model", "parts": [{"functionCall": {"name": "weather", "args": ROME}}]},
                {"role": "user", "parts": [{"functionResponse": {"name": "weather", "response": {"degrees": 21}}}]},
                {"role": "model", "parts": [{"text": "Y"}, {"text": "o"}]},
            ],
        },
        [KIND, HI, CALLING, {"role": "tool", "content": '{"degrees": 21}', "name": "weather"}, YO],
    ),
    "the messages of Bedrock": (
        {
            "schemaVersion": "bedrock-conversation-2024",
            "system": [{"text": "Be kind."}],
            "messages": [{**HI, "content": [{"text": "Hi"}]}, {**YO, "content": [{"text": "Yo"}]}],
        },
        [KIND, HI, YO],
    ),
    "a run of LangChain": (
        {
            "messages": [
                {"type": "human", "content": "Hi", "additional_kwargs": {}, "response_metadata": {}},
                {"type": "ai", "content": "Yo", "tool_calls": [], "usage_metadata": {"input_tokens": 3}},
            ]
        },
        [HI, YO],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_public_data_sets_go_in_as_they_are(name: str) -> None:
    row, messages = SHAPES[name]
    conversation = Converter().read(row, "f:1")
    assert isinstance(conversation, Conversation)
    assert conversation.messages == messages
    assert [bool(weight) for weight in conversation.weights] == [m["role"] == "assistant" for m in messages]
    assert bool(conversation.tools) == bool(row.get("tools", row.get("functions", "[]")) != "[]")
    assert conversation.template_kwargs == row.get("chat_template_kwargs", {})


@pytest.mark.parametrize(
    ("name", "row", "columns"),
    [
        ("gsm8k", {"question": "Hi", "answer": "Yo"}, {"prompt": "question", "completion": "answer"}),
        (
            "Open-Orca/OpenOrca",
            {"id": "1", "system_prompt": "", "question": "Hi", "response": "Yo"},
            {"prompt": "question", "completion": "response"},
        ),
        ("stingning/ultrachat", {"id": "0", "data": ["Hi", "Yo"]}, {"messages": "data"}),
        ("trl-lib/kto-mix-14k", {"prompt": [HI], "completion": [YO], "label": True}, {"weight": "label"}),
        ("trl-lib/ultrafeedback_binarized", {"chosen": [HI, YO], "rejected": [HI, YO]}, {"messages": "chosen"}),
        (
            "Intel/orca_dpo_pairs",
            {"question": "Hi", "chosen": "Yo", "rejected": "x"},
            {"prompt": "question", "completion": "chosen"},
        ),
    ],
)
def test_columns_of_other_public_data_sets_can_be_mapped(name: str, row: Any, columns: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"data\.columns="):
        Converter()(row, name)
    assert Converter(Reading(columns=columns))(row, name).messages == [HI, YO]


def test_a_thought_in_a_column_is_mapped_to_the_answer() -> None:
    row = {"question": "Hi", "attempt": "Yo", "thinking": "Hm", "cot_type": "math"}  # as simplescaling/s1K-1.1
    columns = {"prompt": "question", "completion": "attempt", "reasoning_content": "thinking"}
    assert Converter(Reading(columns=columns))(row, "f:1").messages == [HI, {**YO, "reasoning_content": "Hm"}]


_PARTS = [{"type": "image", "text": None}, {"type": "text", "text": "Hi"}]
VISION = [  # as trl-lib/llava-instruct-mix, liuhaotian/LLaVA-Instruct-150K, LLaMA-Factory's mllm_demo, OpenAI's
    {"images": ["a.png"], "messages": [{"role": "user", "content": _PARTS}, YO]},
    {"image": "a.png", "prompt": [{"role": "user", "content": _PARTS}], "completion": [YO]},
    {"image": "a.png", "conversations": [{**HUMAN, "value": "<image>\nHi"}, GPT]},
    {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>Hi"}, YO]},
    {"audios": ["a.wav"], "instruction": "<audio>Hi", "output": "Yo"},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}, _PARTS[1]]}, YO]},
]


@pytest.mark.parametrize("row", VISION)
def test_what_a_refused_row_with_images_names_as_a_remedy_works(row: dict[str, Any]) -> None:
    with pytest.raises(
        InputError, match=r" To leave such rows out: data.invalid_rows=skip\. .*data\.format=\S+"
    ) as refusal:
        Converter()(row, "f:1")
    named = re.search(r"data\.format=([\w-]+)", str(refusal.value))
    convert = Converter(Reading(format=named and named[1]))
    assert convert(row, "f:1").messages == [HI, YO]
    assert [key for key in convert.ignored if key.startswith("messages[]")]


def test_a_place_of_an_image_is_a_text_where_there_is_none() -> None:
    row = {"messages": [{"role": "user", "content": "What is <image> in SVG?"}, YO]}
    assert Converter(Reading(format="chat"))(row, "f:1").messages == row["messages"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"message_id": "1", "parent_id": None, "text": "Hi", "role": "prompter", "lang": "en"}, "conversation tree"),
        ({"message_tree_id": "1", "prompt": {"text": "Hi", "role": "prompter", "replies": []}}, "conversation tree"),
        ({"image": "a.jpg", "conversations": [HUMAN, GPT]}, "only texts can be trained on"),
        ({"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Ho"}, "data.columns={text: chosen}"),
    ],
)
def test_public_data_of_another_kind_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Converter()(row, "f:1")
