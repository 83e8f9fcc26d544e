from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pytest
from pyarrow import parquet

from lightning_sft.data.rows.files import read_file
from lightning_sft.data.rows.messages import Converter, Reading, TrainOn, to_conversation
from lightning_sft.types import InputError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
SYSTEM = {"role": "system", "content": "Be kind."}
OBSERVED = {"role": "tool", "content": "21"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def calling(*arguments: dict[str, Any]) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": each}} for each in arguments]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def test_a_row_without_a_column_that_is_mapped_is_said_to_lack_it() -> None:
    convert = Converter(Reading(columns={"prompt": "question", "completion": "answer"}))
    with pytest.raises(InputError, match=r"f:1: the row has no 'answer', which data.columns=.* keys are \['question'"):
        convert({"question": "Hi"}, "f:1")


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({"instruction": "Hi", "output": ["a", "b"]}, {}, "'output' must be a string, or a list of messages, got list"),
        ({"instruction": "Hi", "output": 3.5}, {}, "'output' must be a string, got float 3.5"),
        ({"instruction": "Hi", "context": 3, "output": "a"}, {}, "'context' must be a string, got int 3"),
        ({"query": 3, "response": "Yo"}, {}, "'query' must be a string, got int 3"),
        ({"prompt": ["Hi"], "completion": "Yo"}, {}, "'prompt' must be a string, or a list of messages, got list"),
        ({"q": None, "a": "Yo"}, {"prompt": "q", "completion": "a"}, "'q' must be a string, got null"),
        ({"talk": 3}, {"messages": "talk"}, "'talk' must be a list of .* got int 3"),
        ({"body": 3}, {"text": "body"}, "'body' must be a string, got int 3"),
        ({"text": "a", "loss_weight": "x"}, {}, "'loss_weight' must be a finite number .* got str 'x'"),
    ],
)
def test_a_value_that_is_no_text_is_named_by_its_column(row: Any, columns: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        to_conversation(row, columns=columns)


@pytest.mark.parametrize("row", [{"prompt": "Hi", "completion": "Yo"}, {"q": "Hi", "a": "Yo"}])
def test_an_array_on_a_line_is_said_to_be_one(row: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"a:1: the row is a list of 2 objects, .* name the file \.json"):
        Converter()([row, row], "a:1")
    assert Converter()([{"input": "Hi", "output": "Yo"}], "a:1").messages == [USER, ANSWER]
    with pytest.raises(InputError, match="turn 2: expected"):
        Converter()([USER, row], "a:1")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_cell_without_a_value_is_said_to_be_null(name: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": None, "completion": "Yo", "messages": None},
        {"prompt": "Hi", "completion": None, "messages": None},
        {"prompt": "Hi", "completion": "Yo", "messages": None},
        {"prompt": None, "completion": None, "messages": [USER, ANSWER]},
    ]
    path = tmp_path / name
    if name == "a.parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    no_prompt, no_answer, plain, chat = [row for row, _ in read_file(path)]
    for row, column in ((no_prompt, "prompt"), (no_answer, "completion")):
        with pytest.raises(InputError, match=f"'{column}' must be a string, got null"):
            to_conversation(row)
    assert to_conversation(plain).messages == to_conversation(chat).messages == [USER, ANSWER]
    assert to_conversation(no_answer, answered=False).messages == [USER]
    convert = Converter()
    convert(plain, "a:3")
    assert not convert.ignored


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "Hi", "completion": "Yo"}, [USER, ANSWER]),
        ({"prompt": "Hi", "completion": "Yo", "system": "Be kind."}, [SYSTEM, USER, ANSWER]),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"prompt": [SYSTEM, USER], "completion": "Yo"}, [SYSTEM, USER, ANSWER]),
        ({"prompt": "Hi", "completion": [ANSWER]}, [USER, ANSWER]),
        ({"instruction": "Hi", "output": "Yo"}, [USER, ANSWER]),
        ({"instruction": "Hi", "response": "Yo"}, [USER, ANSWER]),
        ({"instruction": "Hi", "output": None, "response": "Yo"}, [USER, ANSWER]),
        ({"instruction": "Hi", "input": "", "output": "Yo"}, [USER, ANSWER]),
        ({"instruction": "Hi", "input": "x", "output": "Yo"}, [{"role": "user", "content": "Hi\n\nx"}, ANSWER]),
        ({"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]}, [SYSTEM, USER, ANSWER, USER, ANSWER]),
        ({"messages": [USER, ANSWER], "system": "Be kind."}, [SYSTEM, USER, ANSWER]),
        ([USER, ANSWER], [USER, ANSWER]),
        ({"instruction": "", "input": "Hi", "output": "Yo"}, [USER, ANSWER]),
        ({"instruction": "Hi", "context": "", "response": "Yo"}, [USER, ANSWER]),
        ({"instruction": "Hi", "context": "x", "response": "Yo"}, [{"role": "user", "content": "Hi\n\nx"}, ANSWER]),
        ({"instruction": "Hi", "output": "Yo", "history": [["Hi", "Yo"]] * 2}, [USER, ANSWER] * 3),
        ({"instruction": "Hi", "output": "Yo", "history": "[]"}, [USER, ANSWER]),
        ({"instruction": "Hi", "output": "Yo", "text": "### Hi ### Yo"}, [USER, ANSWER]),
        ({"messages": [USER, ANSWER], "text": "<|user|>Hi<|assistant|>Yo"}, [USER, ANSWER]),
        ({"prompt": "Hi", "completion": "Yo", "system_prompt": "Be kind."}, [SYSTEM, USER, ANSWER]),
        ({"messages": [USER, ANSWER], "system": [{"type": "text", "text": "Be kind."}]}, [SYSTEM, USER, ANSWER]),
        ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
        ({"conversation": [USER, ANSWER]}, [USER, ANSWER]),
        ({"messages": [json.dumps(USER), json.dumps(ANSWER)]}, [USER, ANSWER]),
        ({"conversations": ["Hi", "Yo", "Hi", "Yo"], "source": "x"}, [USER, ANSWER, USER, ANSWER]),
        ({"conversation": [{"system": "Be kind.", "input": "Hi", "output": "Yo"}]}, [SYSTEM, USER, ANSWER]),
        ({"conversation": [{"input": "Hi", "output": "Yo"}] * 2}, [USER, ANSWER] * 2),
        ({"prompt": USER, "completion": {"from": "gpt", "value": "Yo"}}, [USER, ANSWER]),
        ({"query": "Hi", "answers": '[{"name": "weather", "arguments": {}}]'}, [USER, calling({})]),
        ({"query": "Hi", "response": "Yo", "history": [["Hi", "Yo"]]}, [USER, ANSWER] * 2),
        (
            {"conversation": [{"human": "Hi", "assistant": "Yo"}] * 2, "system": "Be kind."},
            [SYSTEM, *[USER, ANSWER] * 2],
        ),
        (
            {"prompt": "Hi", "completion": "Yo", "reasoning_content": "Hm"},
            [USER, {**ANSWER, "reasoning_content": "Hm"}],
        ),
        ({"messages": [USER, ANSWER], "prompt": None, "completion": None}, [USER, ANSWER]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}, [USER, ANSWER]),
        ({"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yo"}]}, [USER, ANSWER]),
        ({"conversations": [USER, ANSWER], "system": "Be kind."}, [SYSTEM, USER, ANSWER]),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be kind."},
                    {"from": "human", "value": "Hi"},
                    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
                    {"from": "observation", "value": "21"},
                    {"from": "gpt", "value": "Yo"},
                ]
            },
            [SYSTEM, USER, calling({"city": "Rome"}), OBSERVED, ANSWER],
        ),
    ],
)
def test_every_format_becomes_the_same_messages(row: Any, messages: list[dict[str, str]]) -> None:
    conversation = to_conversation(row, "f:1")
    assert conversation.messages == messages
    assert conversation.weights == [float(m["role"] == "assistant") for m in messages]
    assert conversation.provenance == "f:1"
    assert conversation.tools is None


def test_plain_text_is_one_message_that_is_all_target() -> None:
    conversation = to_conversation({"text": "Once upon a time", "weight": 2})
    assert (conversation.messages, conversation.weights) == ([{"role": "text", "content": "Once upon a time"}], [2.0])


@pytest.mark.parametrize("tools", [[TOOL], '[{"type": "function", "function": {"name": "weather", "parameters": {}}}]'])
@pytest.mark.parametrize("row", [{"messages": [USER, ANSWER]}, {"prompt": "Hi", "completion": "Yo"}])
def test_tools_may_be_a_list_or_its_json_text(row: dict[str, Any], tools: Any) -> None:
    assert to_conversation({**row, "tools": tools}).tools == [TOOL]


def test_a_tool_without_the_function_around_it_gets_it() -> None:
    assert to_conversation({"messages": [USER, ANSWER], "tools": [TOOL["function"]]}).tools == [TOOL]


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools_are_none(tools: Any) -> None:
    assert to_conversation({"messages": [USER, ANSWER], "tools": tools}).tools is None


@pytest.mark.parametrize(
    ("row", "weights"),
    [
        ({"messages": [USER, {**ANSWER, "loss": False}, USER, ANSWER]}, [0, 0, 0, 1]),
        ({"messages": [USER, {**ANSWER, "train": False}, USER, {**ANSWER, "train": True}]}, [0, 0, 0, 1]),
        ({"messages": [{**USER, "loss": True}, ANSWER]}, [1, 1]),
        ({"messages": [{**USER, "loss_weight": 0.0}, {**ANSWER, "loss_weight": 0.25}]}, [0, 0.25]),
        ({"messages": [USER, {**ANSWER, "weight": 3}]}, [0, 3]),
        ({"messages": [USER, {**ANSWER, "weight": 3, "loss_weight": 0.5, "train": True, "loss": None}]}, [0, 1.5]),
        ({"messages": [{**USER, "weight": 0.5}, {**ANSWER, "weight": 0.5}], "weight": 0.5}, [0.25, 0.25]),
        ({"prompt": "Hi", "completion": "Yo", "weight": 2}, [0, 2]),
        ({"prompt": "Hi", "completion": "Yo", "weight": "0.5"}, [0, 0.5]),
        ({"prompt": "Hi", "completion": "Yo", "weight": None}, [0, 1]),
        ({"prompt": [USER, ANSWER, USER], "completion": "Yo"}, [0, 0, 0, 1]),
        ({"prompt": [USER, {**ANSWER, "loss": True}, USER], "completion": "Yo"}, [0, 1, 0, 1]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo", "weight": 0}]}, [0, 0]),
    ],
)
def test_flags_and_weights_multiply(row: dict[str, Any], weights: list[float]) -> None:
    assert to_conversation(row).weights == weights


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Hi", "reply": "Yo"}, r"f:1: the keys \['question', 'reply'\] are of no known format"),
        ({"question": "Hi", "answer": "Yo"}, "data.columns={prompt: question, completion: answer}"),
        ({"Problem": "Hi", "solution": "Yo"}, "data.columns={prompt: Problem, completion: solution}"),
        ({"a": "Hi"}, "data.columns={prompt: question, completion: answer}"),
        ({}, "of no known format"),
        ({"prompt": "Hi"}, "of no known format"),
        ({f"k{i:02}": 0 for i in range(20)}, r"'k11', '\.\.\. and 8 more'\]"),
        (3, "a row must be an object with named keys, or a list of messages, got int 3"),
        ("Hi", "got str 'Hi'"),
        ([], "'messages' must be a list of"),
        (
            {"prompt": "Hi", "completion": "Yo", "messages": [USER]},
            "of several formats at once: chat and prompt-completion. Say which with data.format",
        ),
        (
            {"instruction": "Hi", "output": "Yo", "response": "Ya"},
            r"f:1: the row has both 'output' and 'response'\. Say which is the answer: data.columns={output: output}",
        ),
        ({"instruction": "Hi", "instances": [{"output": "Yo"}]}, "the row nests its answers in 'instances'"),
        (
            {"instruction": "Hi", "input": "a", "context": "b", "output": "Yo"},
            "both 'input' and 'context'. .*{input: context}",
        ),
        ({"instruction": "Hi", "output": "Yo", "history": ["Hi"]}, r"'history' must be a list of \[question, answer\]"),
        ({"prompt": [USER], "completion": [USER, ANSWER]}, "the answer begins with the prompt's first message"),
        ({"prompt": "Hi", "completion": "Yo", "label": False}, "'label' is False: .* data.columns={weight: label}"),
        ({"messages": [USER, ANSWER], "label": True}, "'label' is True: .* data.format=chat"),
        ({"prompt": "Hi", "completion": "Yo", "label": 0}, "'label' is 0: .* data.columns={weight: label}"),
        ({"messages": [USER, ANSWER], "kto_tag": 1.0}, "'kto_tag' is 1.0: .* data.format=chat"),
        ({"messages": [USER, ANSWER], "rejected_response": "No"}, "'rejected_response' has the answer .*format=chat"),
        ({"prompt": "Hi", "completion": "Yo", "rejected": "No"}, "'rejected' has .* data.format=prompt-completion"),
        ({"prompt": "Hi", "completion": "Yo", "context": "It"}, "'context', for which prompt-completion has no place"),
        ({"query": "Hi", "response": "Yo", "documents": ["It"]}, "{instruction: query, input: documents, output: resp"),
        ({"inputs": "Hi", "targets": "Yo"}, "data.columns={prompt: inputs, completion: targets}"),
        ({"user": "Hi", "assistant": "Yo"}, "data.columns={prompt: user, completion: assistant}"),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "the row has 'images', and only texts .* data.format=chat"),
        ({"chosen_messages": [USER, ANSWER], "rejected_messages": [USER]}, "{messages: chosen_messages}"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "a preference pair, .* data.columns={completion: chosen}"),
        ({"prompt": "Hi", "completion": "Yo", "chosen": "a", "rejected": "b"}, "a preference pair"),
        ({"question": "Hi", "chosen": "a", "rejected": "b"}, "{prompt: question, completion: chosen}"),
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "{messages: chosen}"),
        (
            {"messages": [USER, ANSWER, USER], "chosen": ANSWER, "rejected": ANSWER},
            "{prompt: messages, completion: chosen}",
        ),
        ({"instruction": "Hi", "chosen": "a", "rejected": "b"}, "{output: chosen}"),
        ({"chosen": "a", "rejected": "b"}, "{text: chosen}"),
        ({"text": "Hi", "role": "prompter", "parent_id": None}, "the row is a message of a conversation tree"),
        ({"input_ids": [1, 2], "attention_mask": [1, 1]}, "nothing says which of them to learn. Add 'labels'"),
        ({"data": ["Hi", "Yo"]}, "'data' looks like messages: str 'Hi'. .* data.columns={messages: data}"),
        ({"turns": [USER, ANSWER]}, "data.columns={messages: turns}"),
        ({"version": 1, "data": [{"prompt": "a"}]}, "the row has its rows in 'data': 1 objects, .* Write them alone"),
        ({"data": [{"question": "a", "answer": "b"}] * 2}, "the row has its rows in 'data': 2 objects"),
        ({"data": [{"colour": "red"}]}, "are of no known format"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": 3}, "'chat_template_kwargs' must be an object"),
        (
            {"messages": [USER, ANSWER], "chat_template_kwargs": {"tools": []}},
            "sets 'tools', which is set for each row",
        ),
        ({"prompt": "Hi", "completion": [USER, ANSWER], "reasoning_content": "Hm"}, "needs an answer of one message"),
        ({"prompt": 3, "completion": "Yo"}, "f:1: 'prompt' must be a string, got int 3"),
        ({"prompt": "Hi", "completion": None}, "'completion' must be a string, got null"),
        ({"prompt": "Hi", "completion": []}, "'completion' must be a list of .* got list"),
        ({"instruction": "Hi", "input": ["x"], "output": "Yo"}, "'input' must be a string, got list"),
        ({"instruction": [USER], "output": "Yo"}, "'instruction' must be a string, got list"),
        ({"messages": "Hi"}, "f:1: 'messages' must be a list of .* got str 'Hi'"),
        ({"messages": []}, "'messages' must be a list"),
        ({"conversations": {"from": "gpt"}}, "'conversations' must be a list"),
        ({"messages": [USER, "Hi"]}, "f:1: turn 2: expected {'role', 'content'} or .* got str 'Hi'"),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "Be kind."}, "the system text is there twice"),
        ({"messages": [USER, ANSWER], "system": 3}, "'system' must be a string, got int 3"),
        ({"messages": [USER, ANSWER], "tools": "[{"}, "f:1: 'tools': not valid JSON"),
        ({"messages": [USER, ANSWER], "tools": 3}, "'tools' must be a list of objects, or the JSON text of one"),
        ({"messages": [USER, ANSWER], "tools": [print]}, "'tools' must be a list of objects"),
        ({"messages": [USER, ANSWER], "tools": [{"name": {1}}]}, "'tools': JSON has no value such as set"),
        ({"messages": [USER, ANSWER], "weight": -1}, "f:1: 'weight' must be a finite number that is not negative, got"),
        (
            {"messages": [USER, {**ANSWER, "weight": 1e200}], "weight": 1e200},
            "turn 2: its weight .* is inf: a weight must",
        ),
        ({"text": ["x"]}, "'text' must be a string, got list"),
        ({"text": " \n"}, "the text is empty"),
    ],
)
def test_what_is_no_conversation_is_one_error_that_says_what_was_expected(row: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_conversation(row, "f:1")


def test_for_generation_the_answer_may_be_missing() -> None:
    assert to_conversation({"prompt": "Hi"}, answered=False).messages == [USER]
    assert to_conversation({"instruction": "Hi", "id": 1}, answered=False).messages == [USER]
    assert to_conversation({"prompt": "Hi", "completion": "Yo"}, answered=False).messages == [USER, ANSWER]
    assert to_conversation({"question": "Hi"}, columns={"prompt": "question"}, answered=False).messages == [USER]
    assert to_conversation({"query": "Hi", "tools": "[]"}, answered=False).messages == [USER]
    assert to_conversation({"prompt": "Hi", "chosen": "a", "rejected": "b"}, answered=False).messages == [USER]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "Hi", "answer": "Yo"}, {"prompt": "question", "completion": "answer"}),
        ({"completion": "Hi", "prompt": "Yo"}, {"prompt": "completion", "completion": "prompt"}),
        ({"prompt": "no", "question": "Hi", "answer": "Yo"}, {"prompt": "question", "completion": "answer"}),
        ({"instruction": "Hi", "output": "no", "response": "Yo"}, {"output": "response"}),
        ({"instruction": "Hi", "output": "Yo", "response": "no"}, {"output": "output"}),
        ({"chat": [USER, ANSWER]}, {"messages": "chat"}),
    ],
)
def test_columns_of_other_names_can_be_mapped(row: dict[str, Any], columns: dict[str, str]) -> None:
    assert to_conversation(row, columns=columns).messages == [USER, ANSWER]


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"a": "Hi"}, {"columns": {"promt": "a"}}, "'promt' is no key of a format. .* keys are .*completion"),
        ({"a": "Hi"}, {"columns": {"prompt": "q"}}, r"the row has no 'q', which data\.columns=\{'prompt': 'q'\}"),
        ({"prompt": "Hi"}, {"format": "sharegtp"}, "data.format=sharegtp is no format. Expected one of chat, sharegpt"),
        ({"prompt": "Hi"}, {"format": "chat"}, r"the keys \['prompt'\] are not those of chat: messages"),
        ({"instruction": "Hi"}, {"format": "alpaca"}, "are not those of alpaca: instruction, output or response"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(row: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_conversation(row, **settings)


def test_the_named_format_decides_where_several_would_do() -> None:
    row = {"text": "x", "instruction": "Hi", "output": "Yo"}
    assert to_conversation(row, format="alpaca").messages == [USER, ANSWER]
    assert to_conversation(row, format="text").messages == [{"role": "text", "content": "x"}]


def test_keys_without_a_meaning_are_counted() -> None:
    convert = Converter()
    convert({"prompt": "Hi", "completion": "Yo", "id": 3, "input": "x"}, "f:1")
    convert({"prompt": "Hi", "completion": "Yo", "id": 3, "system": "x", "weight": 1, "tools": None}, "f:2")
    assert convert.ignored == {"id": 2, "input": 1}
    convert = Converter()
    convert({"messages": [USER, ANSWER], "parallel_tool_calls": False}, "f:1")
    assert convert.ignored == {"parallel_tool_calls": 1}
    convert = Converter(Reading(columns={"prompt": "question", "completion": "answer"}))
    convert({"question": "Hi", "answer": "Yo", "prompt": "x"}, "f:1")
    assert convert.ignored == {"prompt": 1}


def test_the_remedies_of_preference_rows_and_verdicts_work() -> None:
    pair = {"chosen": "Yo", "rejected": "No"}
    assert to_conversation({"prompt": "Hi", **pair}, columns={"completion": "chosen"}).messages == [USER, ANSWER]
    whole = {"chosen": [USER, ANSWER], "rejected": [USER]}
    assert to_conversation(whole, columns={"messages": "chosen"}).messages == [USER, ANSWER]
    assert to_conversation({**whole, "messages": [USER, ANSWER]}).messages == [USER, ANSWER]  # what was chosen
    before = {"conversations": [USER], "chosen": ANSWER, "rejected": ANSWER}
    columns = {"prompt": "conversations", "completion": "chosen"}
    assert to_conversation(before, columns=columns).messages == [USER, ANSWER]
    for label in (True, False, "true", "False", 1, 0.0):
        row = {"prompt": "Hi", "completion": "Yo", "label": label}
        assert to_conversation(row, columns={"weight": "label"}).weights == [0, label in (True, "true", 1)]
        assert to_conversation(row, format="prompt-completion").weights == [0, 1]
    assert to_conversation({"messages": [USER, ANSWER], "rejected_response": "No"}, format="chat").weights == [0, 1]


def test_the_remedies_of_a_context_without_a_place_work() -> None:
    row = {"question": "Who?", "answer": "Yo", "context": "It is Yo."}
    asked = {"prompt": "question", "completion": "answer"}
    with pytest.raises(InputError, match=r"{instruction: question, input: context, output: answer}\. To leave it out"):
        to_conversation(row, columns=asked)
    shown = to_conversation(row, columns={"instruction": "question", "input": "context", "output": "answer"})
    assert "It is Yo." in shown.messages[0]["content"]
    assert to_conversation(row, columns=asked, format="prompt-completion").messages[0]["content"] == "Who?"
    assert to_conversation({**row, "context": ""}, columns=asked).messages[0]["content"] == "Who?"


@pytest.mark.parametrize("more", [{"label": True}, {"parent_id": "1", "author": "x"}, {"role": "x"}, {"chosen": 1}])
def test_texts_with_columns_of_their_own_are_texts(more: dict[str, Any]) -> None:
    convert = Converter()
    assert convert({"text": "Hi", **more}, "row 1").messages == [{"role": "text", "content": "Hi"}]
    assert convert.ignored == dict.fromkeys(more, 1)


def test_what_is_trained_on_is_chosen_by_turn() -> None:
    turns = [SYSTEM, USER, ANSWER, USER, ANSWER]
    weights = {
        name: to_conversation({"messages": turns, "weight": 2}, train_on=name).weights for name in get_args(TrainOn)
    }
    assert weights == {"all": [0, 0, 2, 0, 2], "last": [0, 0, 0, 0, 2], "prompts": [2, 2, 2, 2, 2]}
    flagged = [USER, ANSWER, USER, {**ANSWER, "weight": 0.5}, {**USER, "train": False}]
    assert to_conversation(flagged, train_on="last").weights == [0, 0, 0, 0.5, 0]
    assert to_conversation(flagged, train_on="prompts").weights == [1, 1, 1, 0.5, 0]
    asked = {"prompt": [USER, ANSWER, USER], "completion": "Yo"}
    assert to_conversation(asked, train_on="prompts").weights == [1, 1, 1, 1]
    with pytest.raises(InputError, match="train_on"):
        to_conversation(asked, train_on="first")  # type: ignore[arg-type]


def test_a_system_prompt_is_for_conversations_that_have_none() -> None:
    kind = Reading(system="Be kind.")
    assert Converter(kind)([USER, ANSWER], "row 1").messages == [SYSTEM, USER, ANSWER]
    assert Converter(kind)([USER, ANSWER], "row 1").weights == [0, 0, 1]
    own = {"role": "system", "content": "Be brief."}
    assert Converter(kind)([own, USER, ANSWER], "row 1").messages == [own, USER, ANSWER]
    assert Converter(kind)({"prompt": "Hi", "completion": "Yo", "system": "Be brief."}, "row 1").messages[0] == own
    assert Converter(kind)({"text": "x"}, "row 1").messages == [{"role": "text", "content": "x"}]


@pytest.mark.parametrize("given", [{"enable_thinking": False}, '{"enable_thinking": false}'])
def test_variables_of_the_template_belong_to_the_conversation(given: Any) -> None:
    row = {"prompt": "Hi", "completion": "Yo", "chat_template_kwargs": given}
    assert to_conversation(row).template_kwargs == {"enable_thinking": False}
    assert to_conversation({"prompt": "Hi", "completion": "Yo"}).template_kwargs == {}


def test_ignored_keys_of_messages_are_counted_once_a_row() -> None:
    convert = Converter(Reading(message_keys={"mood": "ignored"}))
    convert([{**USER, "timestamp": 1, "mood": "x"}, {**ANSWER, "timestamp": 2}], "row 1")
    convert([{**USER, "timestamp": 1}, ANSWER], "row 2")
    assert convert.ignored == {"messages[].timestamp": 2, "messages[].mood": 1}


def test_a_file_keeps_to_one_format() -> None:
    convert = Converter()
    convert({"prompt": "Hi", "completion": "Yo"}, "a.jsonl:1")
    convert({"messages": [USER, ANSWER]}, "b.jsonl:1")
    message = r"a.jsonl:7: the row is of the format chat, but a.jsonl:1 is of prompt-completion\. .* data.format"
    with pytest.raises(InputError, match=message):
        convert({"messages": [USER, ANSWER]}, "a.jsonl:7")
    convert({"prompt": "Hi", "completion": "Yo"}, "a.jsonl:8")


def test_a_list_may_mix_formats() -> None:
    convert = Converter()
    rows = [{"prompt": "Hi", "completion": "Yo"}, [USER, ANSWER]]
    assert [convert(row, f"row {n}").messages for n, row in enumerate(rows, 1)] == [[USER, ANSWER]] * 2


def test_a_named_format_is_not_mixed() -> None:
    rows = [
        {"messages": [USER, ANSWER], "prompt": "Hey"},
        {"prompt": "Hey", "completion": "Ho", "messages": [USER, ANSWER]},
    ]
    told = Converter()  # by its keys, the second row is of two formats at once
    assert told(rows[0], "a.jsonl:1").messages == [USER, ANSWER]
    with pytest.raises(InputError, match=r"a.jsonl:2: the keys .* are of several formats at once"):
        told(rows[1], "a.jsonl:2")
    for order in (rows, rows[::-1]):
        named = Converter(Reading("chat"))
        assert [named(row, f"a.jsonl:{n}").messages for n, row in enumerate(order, 1)] == [[USER, ANSWER]] * 2
    with pytest.raises(InputError, match=r"a.jsonl:3: the keys \['completion', 'prompt'\] are not those of chat"):
        named({"prompt": "Hey", "completion": "Ho"}, "a.jsonl:3")


@pytest.mark.parametrize("key", ["loss", "train"])
@pytest.mark.parametrize("value", [False, True, "False"])
def test_a_flag_of_a_row_is_refused_until_it_is_said_what_it_means(key: str, value: Any) -> None:
    row = {"prompt": "Hi", "completion": "Yo", key: value}
    with pytest.raises(InputError, match=rf"{key!r} is {value}: the row says .* data\.columns={{weight: {key}}} with"):
        Converter()(row, "f:1")
    assert Converter(Reading(columns={"weight": key}))(row, "f:1").weights == [0.0, float(value is True)]
    assert Converter(Reading(format="prompt-completion"))(row, "f:1").weights == [0.0, 1.0]


def test_a_number_that_is_no_flag_is_ignored_and_other_names_of_a_weight_are_read() -> None:
    convert = Converter()
    assert convert({"prompt": "Hi", "completion": "Yo", "loss": 0.7}, "f:1").weights == [0.0, 1.0]
    assert convert.ignored == {"loss": 1}
    for name in ("loss_weight", "sample_weight"):
        assert convert({"prompt": "Hi", "completion": "Yo", name: 0.5}, "f:1").weights == [0.0, 0.5]
    with pytest.raises(InputError, match="both 'weight' and 'loss_weight'"):
        convert({"prompt": "Hi", "completion": "Yo", "weight": 1, "loss_weight": 0.5}, "f:1")
