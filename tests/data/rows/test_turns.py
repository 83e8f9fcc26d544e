from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.data.rows.dialects import CALLERS, ROLES, Dialect
from lightning_sft.data.rows.turns import Turn, read_turns
from lightning_sft.types import InputError


def read_turn(message: Any) -> Turn:
    [turn] = read_turns(message)
    return turn


def calling(*arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": each}} for each in arguments]
    return {"role": "assistant", "content": "", "tool_calls": calls, **more}


def call(arguments: Any = {}, **more: Any) -> dict[str, Any]:  # noqa: B006  # never changed
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}, **more}


ROME = {"city": "Rome"}
TEXT = {"type": "text", "value": "Yo"}
THOUGHT = {"type": "reasoning", "value": "Hm"}
CALL_PART = {"type": "tool_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'}


@pytest.mark.parametrize(("alias", "role"), ROLES.items())
@pytest.mark.parametrize("names", [("role", "content"), ("from", "value")])
def test_roles_have_one_name(alias: str, role: str, names: tuple[str, str]) -> None:
    content = '{"name": "weather", "arguments": {}}' if alias in CALLERS else "x"
    assert read_turn(dict(zip(names, (alias, content), strict=True)))[0]["role"] == role


@pytest.mark.parametrize(
    ("given_", "turn"),
    [
        ({"content": "Yo"}, {"content": "Yo"}),
        ({"content": ""}, {"content": ""}),
        ({"content": "Yo", "refusal": None, "tool_calls": None}, {"content": "Yo"}),
        ({"content": "Yo", "tool_calls": []}, {"content": "Yo"}),
        ({"content": [TEXT]}, {"content": "Yo"}),
        ({"content": [{"type": "text", "text": "Yo"}, TEXT]}, {"content": "YoYo"}),
        ({"content": [{"type": "text", "text": "Yo", "value": None, "image_url": None}]}, {"content": "Yo"}),
        ({"content": []}, {"content": ""}),
        ({"content": "Yo", "reasoning_content": "Hm"}, {"content": "Yo", "reasoning_content": "Hm"}),
        ({"content": "Yo", "thinking": "Hm"}, {"content": "Yo", "reasoning_content": "Hm"}),
        ({"content": "Yo", "thinking": "", "reasoning": None}, {"content": "Yo", "reasoning_content": ""}),
        ({"content": [THOUGHT, TEXT]}, {"content": "Yo", "reasoning_content": "Hm"}),
        ({"content": [{"type": "thinking", "thinking": "Hm"}, THOUGHT, TEXT]}, {"reasoning_content": "HmHm"}),
        ({"content": [THOUGHT, CALL_PART, CALL_PART]}, calling(ROME, ROME, reasoning_content="Hm")),
        ({"content": [TEXT, {**CALL_PART, "value": [call(ROME)]}]}, calling(ROME, content="Yo")),
        ({"content": None, "tool_calls": [call(ROME)]}, calling(ROME)),
        ({"tool_calls": [call(ROME), call({})]}, calling(ROME, {})),
        ({"content": "Yo", "tool_calls": [call(ROME)]}, calling(ROME, content="Yo")),
        ({"tool_calls": [call('{"city": "Rome"}')]}, calling(ROME)),
        ({"tool_calls": [call(json.dumps('{"city": "Rome"}'))]}, calling(ROME)),
        ({"tool_calls": [{"name": "weather", "arguments": ROME}]}, calling(ROME)),
        ({"tool_calls": [{**call(ROME, id="c1"), "index": None}]}, {"tool_calls": [call(ROME, id="c1")]}),
        ({"tool_calls": [call({"day": None, "at": [None]})]}, calling({"day": None, "at": [None]})),
    ],
)
def test_an_answer_has_one_normal_form(given_: dict[str, Any], turn: dict[str, Any]) -> None:
    read, weight = read_turn({"role": "assistant", **given_})
    assert read == {**read, "role": "assistant", **turn}
    assert read.keys() <= {"role", "content"} | turn.keys()
    assert isinstance(read["content"], str)
    assert weight is None


def test_a_tool_keeps_whom_it_answers() -> None:
    given_ = {"role": "tool", "content": "21", "name": "weather", "tool_call_id": "c1"}
    assert read_turn(given_) == (given_, None)


@pytest.mark.parametrize("value", [[call(ROME), call({})], json.dumps([call(ROME), call({})])])
def test_a_turn_of_function_calls_may_have_several(value: Any) -> None:
    assert read_turn({"from": "function_call", "value": value})[0] == calling(ROME, {})


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (None, "expected {'role', 'content'} or {'from', 'value'}, got null"),
        ({"content": "x"}, "expected .* got dict {'content': 'x'}"),
        ({"role": "fool", "content": "x"}, "the role must be one of system, .* got str 'fool'. .* data.roles"),
        ({"role": ["user"], "content": "x"}, r"the role must be one of .* got list \['user'\]"),
        ({"from": None, "value": "x"}, "the role must be one of .* got null"),
        ({"role": "user"}, r"'content' \(user\) must be a string, got null"),
        ({"from": "gpt", "value": None}, r"'value' \(assistant\) must be a string"),
        ({"role": "user", "content": 3}, r"'content' \(user\) must be a string, got int 3"),
        ({"role": "user", "content": "x\udc80"}, r"'content' \(user\) has half a character at 1: str '\\udc80'"),
        (
            {"role": "user", "content": "x", "mood": "A"},
            r"the keys \['mood'\] have no meaning in .* role 'user'. .*data.message_keys={key: ignored}",
        ),
        ({"role": "user", "value": "x", "content": "y"}, r"the keys \['value'\] have no meaning"),
        ({"role": "user", "content": "x", 3: 1, "a": 1}, r"the keys \['3', 'a'\] have no meaning"),
        ({"role": "tool", "content": "x", "name": 3}, "'name' must be a string, got int 3"),
        (
            {"role": "tool", "content": "x", "reasoning_content": "x"},
            r"the keys \['reasoning_content'\] have no meaning",
        ),
        ({"role": "user", "content": "x", "tool_calls": [call()]}, "only an assistant has reasoning and tool calls"),
        ({"role": "user", "content": [THOUGHT]}, "only an assistant has reasoning and tool calls"),
        ({"role": "user", "content": [CALL_PART]}, "only an assistant has reasoning .* the role is 'user'"),
        (
            {"role": "user", "content": "x", "loss": 1},
            "'loss' must be true or false, got int 1. A number is a 'weight'",
        ),
        ({"role": "user", "content": "x", "train": "no"}, "'train' must be true or false, got str 'no'"),
        *(
            ({"role": "user", "content": "x", key: value}, f"'{key}' must be a finite number that is not negative, got")
            for key in ("weight", "loss_weight")
            for value in (-0.1, float("nan"), float("inf"), True, "heavy", "nan", [1], 10**400)
        ),
        ({"role": "assistant", "content": "x", "thinking": 3}, "'thinking' must be a string"),
        (
            {"role": "assistant", "content": "x", "thinking": "a", "reasoning_content": "b"},
            "the reasoning is there twice: 'reasoning_content' and 'thinking'. Keep one",
        ),
        (
            {"role": "assistant", "content": [THOUGHT], "thinking": "a"},
            "the reasoning is there twice: a part of the content and 'thinking'",
        ),
        ({"role": "assistant", "content": [CALL_PART], "tool_calls": [call()]}, "the tool calls are there twice"),
        (
            {"role": "assistant", "tool_calls": [call()], "function_call": {"name": "f", "arguments": {}}},
            "the tool calls are there twice: in 'tool_calls' and in 'function_call'",
        ),
        (
            {"role": "user", "content": [TEXT, {"type": "tool_result", "content": "x"}]},
            "part 2 of the content is tool_result, which stands before",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image", "image": "a.png"}]},
            "part 2 of the content is of the type 'image', and only texts can be trained on",
        ),
        ({"role": "user", "content": ["x"]}, "part 1 of the content must be of the type .* got str 'x'"),
        (
            {"role": "user", "content": [TEXT, {"type": "image_url", "image_url": "x"}]},
            "is of the type 'image_url', and",
        ),
        ({"role": "user", "content": [{"type": ["text"]}]}, "part 1 of the content must be of the type"),
        ({"role": "user", "content": [{"type": "text"}]}, "must have its text in 'text' or 'value' and nothing else"),
        ({"role": "user", "content": [{**TEXT, "text": "x"}]}, "must have its text in 'text' or 'value'"),
        ({"role": "user", "content": [{"type": "text", "reasoning": "x"}]}, "must have its text in"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "part 1 of the content must be a string, got int"),
        ({"role": "assistant", "content": [TEXT, THOUGHT]}, "part 2 of the content is reasoning, which stands before"),
        ({"role": "assistant", "content": [CALL_PART, TEXT]}, "part 2 of the content is text, which stands before"),
        ({"role": "assistant", "content": [{**CALL_PART, "value": "{"}]}, "part 1 of the content: not valid JSON"),
        ({"role": "assistant", "tool_calls": "x"}, "'tool_calls': not valid JSON: .* got str 'x'"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "'tool_calls' must be a list, got dict"),
        ({"role": "assistant", "tool_calls": ["x"]}, "tool call 1 must be an object with 'function', got str 'x'"),
        (
            {"role": "assistant", "tool_calls": [call(), {}]},
            "tool call 2 must be a function with 'name' and 'arguments'",
        ),
        ({"role": "assistant", "tool_calls": [{"function": "x"}]}, "tool call 1 must be a function with"),
        ({"role": "assistant", "tool_calls": [call(type="custom")]}, "tool call 1 must be a function with"),
        ({"role": "assistant", "tool_calls": [call(mood=0)]}, "tool call 1 must be a function with .* nothing else"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}, "input": {}}]}, "must be a function with"),
        ({"role": "assistant", "tool_calls": [call(id=3)]}, "the id of tool call 1 must be a string"),
        (
            {"role": "assistant", "tool_calls": [{"name": 3, "arguments": {}}]},
            "the name of tool call 1 must be a string",
        ),
        (
            {"role": "assistant", "tool_calls": [call("{")]},
            "the arguments of tool call 1: not valid JSON: .* got str '{'",
        ),
        ({"role": "assistant", "tool_calls": [call('{"a": 1, "a": 2}')]}, "not valid JSON: the key 'a' is there twice"),
        ({"role": "assistant", "tool_calls": [call('{"a": NaN}')]}, "not valid JSON: NaN is no JSON value"),
        ({"role": "assistant", "tool_calls": [call("[" * 10_000)]}, "it is nested too deeply"),
        ({"role": "assistant", "tool_calls": [call("[1]")]}, r"must be an object or its JSON text, got list \[1\]"),
        ({"role": "assistant", "tool_calls": [call(3)]}, "must be an object or its JSON text, got int 3"),
        ({"role": "assistant", "tool_calls": [call({"a": float("inf")})]}, "JSON has no value such as float inf"),
        ({"role": "assistant", "tool_calls": [call({"a": 10**5000})]}, "an integer of 16,610 bits is too long"),
        ({"role": "assistant", "tool_calls": [call({1: 2})]}, "a key in the arguments of tool call 1 must be a string"),
        ({"role": "assistant", "tool_calls": [call({"a": ["\ud800"]})]}, "a text in the arguments .* half a character"),
        (
            {"role": "assistant", "tool_calls": [call({"a": json.loads("[" * 90 + "]" * 90)})]},
            "nested more than 64 deep",
        ),
        ({"from": "function_call", "value": "weather()"}, "the function call: not valid JSON"),
        ({"from": "function_call", "value": None}, "tool call 1 must be an object with 'function', got null"),
    ],
)
def test_what_is_no_message_is_one_error_that_says_what_was_expected(turn: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_turn(turn)


@pytest.mark.parametrize(
    ("message", "turn"),
    [
        ({"role": "User", "content": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"role": "prompter", "text": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"speaker": "bot", "text": "Yo"}, {"role": "assistant", "content": "Yo"}),
        ({"author": "human", "message": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"sender": "ai", "utterance": "Yo"}, {"role": "assistant", "content": "Yo"}),
        ({"type": "human", "content": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"role": "user", "content": "Hi", "text": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"role": "user", "content": "Hi", "speaker": "Ann", "type": "message"}, {"role": "user", "content": "Hi"}),
        ({"role": "assistant", "content": "Yo", "thinking": "Hm", "reasoning": "Hm"}, {"reasoning_content": "Hm"}),
        ({"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}}, calling({})),
        ({"role": "assistant", "content": "Yo", "function_call": {}}, {"content": "Yo"}),
        ({"role": "assistant", "tool_calls": json.dumps([call(ROME)])}, calling(ROME)),
        ({"role": "assistant", "tool_calls": [{"name": "weather", "args": ROME, "type": "tool_call"}]}, calling(ROME)),
        ({"role": "assistant", "tool_calls": [{"name": "weather", "parameters": ROME}]}, calling(ROME)),
        ({"role": "assistant", "tool_calls": [call(""), call(None), {"name": "weather"}]}, calling({}, {}, {})),
        (
            {"from": "function-call", "value": """{"name": "weather", "arguments": '{"city": "Rome"}'}"""},
            calling(ROME),
        ),
        ({"from": "tool_call", "value": [{"name": "weather", "arguments": ROME}]}, calling(ROME)),
        ({"role": "function", "name": "weather", "content": "21"}, {"role": "tool", "name": "weather"}),
        ({"role": "ipython", "content": {"output": "é"}}, {"role": "tool", "content": '{"output": "é"}'}),
        ({"role": "tool", "content": ["a", {"b": None}]}, {"content": '["a", {"b": null}]'}),
        (
            {"role": "tool", "content": [{"type": "text", "text": "2"}, {"type": "text", "text": "1"}]},
            {"content": "21"},
        ),
        ({"role": "tool", "content": 21}, {"content": "21"}),
        (
            {"role": "assistant", "content": [{"type": "output_text", "text": "Yo", "annotations": []}]},
            {"content": "Yo"},
        ),
        (
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm", "signature": "Ep=="},
                    {"type": "text", "text": "Yo", "citations": []},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": ROME, "cache_control": {"a": 1}},
                ],
            },
            {"content": "Yo", "reasoning_content": "Hm", "tool_calls": [call(ROME, id="t1")]},
        ),
    ],
)
def test_dialects_have_one_normal_form(message: dict[str, Any], turn: dict[str, Any]) -> None:
    read, weight = read_turn(message)
    assert read == {**read, **turn}
    assert read.keys() <= {"role", "content"} | turn.keys()
    assert weight is None


def test_results_in_a_users_message_are_turns_of_the_tool_before_it() -> None:
    parts = [
        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "21"}], "is_error": False},
        {"type": "tool_result", "tool_use_id": "t2"},
    ]
    tools = [({"role": "tool", "content": text, "tool_call_id": id_}, None) for text, id_ in (("21", "t1"), ("", "t2"))]
    assert read_turns({"role": "user", "content": parts}) == tools
    parts.append({"type": "text", "text": "And Rome?"})
    assert read_turns({"role": "user", "content": parts}) == [*tools, ({"role": "user", "content": "And Rome?"}, None)]
    with pytest.raises(InputError, match="only a user's message carries results of tools"):
        read_turns({"role": "assistant", "content": parts})
    with pytest.raises(InputError, match="a tool_result has 'tool_use_id', 'content' and nothing else"):
        read_turns({"role": "user", "content": [{**parts[0], "mood": 3}]})
    with pytest.raises(InputError, match="has a part of the type 'image', and only texts can be trained on"):
        read_turns({"role": "user", "content": [{"type": "tool_result", "content": [{"type": "image", "source": {}}]}]})


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({"timestamp": 3, "annotations": [], "index": 1}, {"timestamp", "annotations", "index"}),
        ({"name": "Ann", "refusal": None, "images": [], "extra": {}, "note": ""}, {"name", "images", "extra", "note"}),
        ({"text": "Yo", "value": "Yo"}, {"text", "value"}),
        ({"content": [{**TEXT, "cache_control": {"type": "ephemeral"}}]}, {"content[].cache_control"}),
        ({"tool_calls": [call(index=0)]}, {"tool_calls[].index"}),
        ({"tool_calls": [], "reasoning": None}, set()),
        ({"agent": "main", "message_type": "action", "thinking_blocks": []}, {"agent", "message_type"}),  # SWE-agent
        ({"done": True, "eval_count": 3}, {"done", "eval_count"}),  # Ollama
        ({"markdown": "*Yo*", "source": "web", "score": 1.0}, {"markdown", "source", "score"}),
    ],
)
def test_keys_that_say_nothing_are_ignored_and_named(more: dict[str, Any], names: set[str]) -> None:
    ignored: set[str] = set()
    read_turns({"role": "assistant", "content": "Yo", **more}, ignored=ignored)
    assert ignored == {f"messages[].{name}" for name in names}


HM = [{"type": "thinking", "thinking": "Hm,", "signature": "x"}, {"type": "redacted_thinking", "data": "EqQ"}]


@pytest.mark.parametrize(
    "more",
    [
        {"thinking_blocks": [*HM, {"type": "thinking", "thinking": " yes."}]},  # LiteLLM
        {"reasoning_content": "Hm, yes.", "thinking_blocks": [{"type": "thinking", "thinking": "Hm, yes."}]},
        {"reasoning": "Hm, yes.", "reasoning_details": [{"type": "reasoning.text", "text": "Hm, yes."}]},  # OpenRouter
        {"reasoning": "Hm, yes.", "reasoning_details": [{"type": "reasoning.encrypted", "data": "EqQ"}]},
    ],
)
def test_a_thought_in_blocks_is_one_thought(more: dict[str, Any]) -> None:
    [(turn, _)] = read_turns({"role": "assistant", "content": "Yo", **more})
    assert turn == {"role": "assistant", "content": "Yo", "reasoning_content": "Hm, yes."}


def test_two_thoughts_in_blocks_are_refused() -> None:
    with pytest.raises(InputError, match="the reasoning is there twice: 'reasoning' and 'thinking_blocks'"):
        read_turns({"role": "assistant", "content": "Yo", "reasoning": "No.", "thinking_blocks": HM})


def test_names_of_ollama_and_of_axolotl() -> None:
    [(turn, _)] = read_turns({"role": "tool", "tool_name": "f", "content": "3"})
    assert turn == {"role": "tool", "name": "f", "content": "3"}
    assert read_turns({"role": "assistant", "content": "Yo", "train_on_turn": False})[0][1] == 0.0


@pytest.mark.parametrize("key", ["refusal", "images", "audio"])
def test_a_key_that_may_say_something_is_no_key_to_ignore(key: str) -> None:
    with pytest.raises(InputError, match=rf"the keys \['{key}'\] have no meaning"):
        read_turns({"role": "assistant", "content": "Yo", key: ["x"]})


def test_names_of_ones_own_come_before_the_common_ones() -> None:
    dialect = Dialect(
        {"narrator": "user", "user": "assistant"}, {"said": "content", "mood": "ignored", "text": "ignored"}
    )
    ignored: set[str] = set()
    [(turn, _)] = read_turns({"role": "Narrator", "said": "Hi", "mood": "sad", "text": "x"}, dialect, ignored)
    assert (turn, ignored) == ({"role": "user", "content": "Hi"}, {"messages[].mood", "messages[].text"})
    assert read_turns({"role": "user", "content": "Hi"}, dialect) == [({"role": "assistant", "content": "Hi"}, None)]
    with pytest.raises(InputError, match=r"data.roles={a: boss}: 'boss' is no role. .* one of system, user"):
        Dialect({"a": "boss"}, {})
    with pytest.raises(InputError, match=r"data.message_keys={a: b}: 'b' is no key of a message. .* role, content"):
        Dialect({}, {"a": "b"})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4), st.integers(0, 2))
def test_arguments_are_the_same_however_often_they_are_encoded(arguments: dict[str, Any], times: int) -> None:
    encoded: Any = arguments
    for _ in range(times):
        encoded = json.dumps(encoded)
    turn, _ = read_turn({"role": "assistant", "tool_calls": [call(encoded)]})
    assert turn["tool_calls"][0]["function"]["arguments"] == arguments


@given(st.text(), st.lists(st.text(), max_size=3))
def test_the_normal_form_of_a_normal_form_is_itself(thought: str, texts: list[str]) -> None:
    parts = [{"type": "reasoning", "value": thought}, *({"type": "text", "text": text} for text in texts), CALL_PART]
    turn, _ = read_turn({"role": "assistant", "content": parts})
    assert turn["content"] == "".join(texts)
    assert read_turn(turn) == (turn, None)


@pytest.mark.parametrize("content", ["<think>\nWhy?\n</think>\n\nSo.", "<think></think>So.", "So."])
def test_a_thought_that_the_content_repeats_is_there_once(content: str) -> None:
    turn, _ = read_turn({"role": "assistant", "content": content, "reasoning_content": "Why?"})
    assert turn == {"role": "assistant", "content": "So.", "reasoning_content": "Why?"}


def test_two_thoughts_are_refused_and_the_remedy_works() -> None:
    message = {"role": "assistant", "content": "<think>Why?</think>So.", "thinking": "How?"}
    with pytest.raises(
        InputError, match=r"twice: 'thinking' and in tags .*; data\.message_keys={thinking: ignored} keeps"
    ):
        read_turns(message)
    [(turn, _)] = read_turns(message, Dialect({}, {"thinking": "ignored"}))
    assert turn == {"role": "assistant", "content": message["content"]}


@pytest.mark.parametrize("kind", ["reasoning", "thinking"])
def test_the_remedy_for_two_thoughts_names_the_part_of_the_content_and_works(kind: str) -> None:
    text = "<think>Why?</think>So."
    parts = [{"type": kind, kind: "How?"}, {"type": "text", "text": text}]
    message = {"role": "assistant", "content": parts, "reasoning_content": "How?"}
    with pytest.raises(InputError) as refused:
        read_turns(message)
    [remedy] = re.findall(r"data\.message_keys=({.*?}) keeps", str(refused.value))
    assert remedy == f"{{{kind}: ignored, reasoning_content: ignored}}"
    ignored: set[str] = set()
    [(turn, _)] = read_turns(message, Dialect({}, yaml.safe_load(remedy)), ignored)
    assert turn == {"role": "assistant", "content": text}
    assert ignored == {f"messages[].content[].{kind}", "messages[].reasoning_content"}


def test_calls_in_tags_are_read_as_calls() -> None:
    value = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>\n'
    value += "<tool_call>{'name': 'weather', 'arguments': {'city': 'Rome'}}</tool_call>"
    assert read_turn({"from": "function_call", "value": value})[0] == calling({}, ROME)
    with pytest.raises(InputError, match="the function call: not valid JSON"):
        read_turn({"from": "function_call", "value": f"I call. {value}"})
