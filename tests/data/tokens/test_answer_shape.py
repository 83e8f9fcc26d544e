"""How a template ends an answer is learnt from its renders of one that has a sentinel in each field."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.data.tokens.answer_shape import (
    Ending,
    Stops,
    is_empty,
    is_written,
    learn,
    num_shared,
    shape_of,
    short,
    value_of,
    values_in,
    with_sentinels,
)
from lightning_sft.types import Message

PROMPT = "<user>q<end>\n<answer>"
TEXT: Message = {"role": "assistant", "content": "b"}
THOUGHT: Message = {**TEXT, "reasoning_content": "t"}


def calling(*arguments: Any) -> Message:
    """An answer with a tool call for each of some arguments."""
    calls = [{"type": "function", "function": {"name": f"f{n}", "arguments": own}} for n, own in enumerate(arguments)]
    return {**TEXT, "tool_calls": calls}


def learnt(
    written: str,
    tail: str,
    after: str | None,
    *,
    message: Message = TEXT,
    past: str = PROMPT,
    prompt: str = PROMPT,
    **known: Any,
) -> Ending:
    """What is learnt of a template that writes an answer so, and behind it a tail, or what comes before a next turn."""
    answer = with_sentinels(message)
    own = past + written.format(*answer.fields)
    stops = Stops(re.compile("<[a-z]+>"), **{"known": (), **known})
    return learn(answer, prompt, own + tail, None if after is None else own + after, stops)


AT_NEXT = Ending(tail="\n", stop="\n<user>")


@pytest.mark.parametrize(
    ("tail", "after", "known", "stop"),
    [
        ("<end>\n", "<end>\n<user>", {}, "<end>"),
        ("<turn><end>\n", "<turn><end>\n<user>", {}, "<turn><end>"),  # a turn that ends with several tokens
        ("<end>\n<over>", "<end>\n<user>", {}, "<end>"),  # a conversation that ends with one of its own
        ("<end>\n<over>", None, {}, "<end>\n<over>"),  # no turn may follow
        ("<end><turn>\n", "<end><turn>\n<user>", {"known": {"<end>"}}, "<end>"),
        ("<end>", "<end><user>", {"known": {"<end>"}}, "<end>"),
        ("<turn><end>", "<turn><user>", {"known": {"<end>"}}, "<turn>"),
        ("<turn><end>", "<turn><user>", {"known": {"<end>"}, "plain": Ending()}, "<turn><end>"),
        ("<end><turn><end>", "\n<user>", {"known": {"<end>"}}, "<end>"),
        ("<end>\n<answer>", "<end>\n<answer>", {"always_prompts": True}, "<end>"),
        ("<turn><end>\n<answer>", "<turn><end>\n<answer>", {"opener": "<answer>"}, "<turn><end>"),
        ("\n<answer><end>", "\n<user>", {"opener": "<answer>", "known": {"<end>"}}, "\n<user>"),
        ("<end><turn>", "\n<user>", {}, "<end><turn>"),
        ("<end>\n", "\n<user>", {}, "<end>"),
        ("\n", "\n<user>", {}, "\n<user>"),  # nothing stands behind an answer but the next turn
        ("\n", "\n\n<user>", {"plain": AT_NEXT}, "\n\n<user>"),
        ("\n", "\n<user>", {"plain": Ending(tail="<end>", stop="<end>")}, ""),
        ("\n", " more\n<user>", {}, ""),
        ("\n", "\nUser: ", {}, ""),
        ("\n", None, {}, ""),
    ],
)
def test_an_answer_is_stopped_by_a_token_of_its_own_or_else_by_that_of_the_next_turn(
    tail: str, after: str | None, known: dict[str, Any], stop: str
) -> None:
    ending = learnt("{}", tail, after, **known)
    assert ending == Ending(tail=tail, stop=stop)
    assert ending.stops_at_next == ("<user>" in stop)


def test_what_stands_before_and_between_fields_is_learnt_and_which_are_lost() -> None:
    def of(written: str, message: Message = THOUGHT) -> tuple[tuple[str, ...], str, str, str]:
        ending = learnt(written, "<end>\n", "<end>\n<user>", message=message)
        assert ending.stop.endswith("<end>")
        assert not ending.header
        return ending.lost, ending.before, ending.between, ending.tail

    assert of("<think>{0}</think>\n{1}") == ((), "<think>", "</think>\n", "<end>\n")
    assert of("<think>{0}</think>") == (("the text",), "<think>", "", "</think><end>\n")
    assert of("\n{1}") == (("the reasoning",), "\n", "", "<end>\n")
    assert of("{1} since {0}") == ((), "", "", "<end>\n")
    assert of("{0} {1} {0}!") == ((), "", " ", "!<end>\n")  # a field may be written twice
    thoughtful = {**THOUGHT, "tool_calls": calling({})["tool_calls"]}
    assert of("({0}) {1}, {2}", thoughtful) == ((), "(", ") ", "<end>\n")
    assert of("({0}) {2}", thoughtful) == (("the text",), "(", ") ", "<end>\n")
    assert learnt("", "<end>", "<end>", message=THOUGHT) == Ending(("the reasoning", "the text"))


def test_an_answer_may_be_all_that_a_template_writes() -> None:
    assert learnt("{}", "<end>", None, prompt="", past="") == Ending(tail="<end>", stop="<end>")


@pytest.mark.parametrize(
    ("prompt", "past", "header", "before"),
    [
        (PROMPT, "<user>Q<end>\n<answer>, ", "<answer>", ", "),
        (PROMPT + "\n", "<answer>\nA<user>Q<end>\n<answer>\n, ", "<answer>\n", ", "),  # the last of two
        (PROMPT + "<think>\n", "<user>Q<end>\n<answer>", "", ""),
        ("User: q\n", "User: Q\n, ", "", ""),
    ],
)
def test_where_a_render_does_not_begin_with_the_prompt_its_last_token_says_where_the_answer_begins(
    prompt: str, past: str, header: str, before: str
) -> None:
    ending = learnt("{}", "<end>", None, prompt=prompt, past=past)
    assert (ending.header, ending.before) == (header, before)


@given(st.text("ab", max_size=9), st.text("ab", max_size=9))
def test_texts_share_their_common_prefix(a: str, b: str) -> None:
    assert num_shared(a, b) == max(size for size in range(10) if a[:size] == b[:size] and size <= min(len(a), len(b)))


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ('a"z', 'a"z'),
        ('aé"z', r"aé\"z"),
        ('aé"z', r"a\u00e9\"z"),
        ("a\0éz", r"a\x00éz"),
        ("a\0'z", r"a\x00\'z"),
        ("a<b>z", r"a\u003cb\u003ez"),
        ("a<b>z", "a&lt;b&gt;z"),
        (" a z\n", "a z"),
    ],
)
def test_a_value_is_found_in_each_way_in_which_templates_write_it_and_not_where_a_letter_is_missing(
    value: str, written: str
) -> None:
    assert is_written(value, f"x{written}x")
    assert not is_written(value, written[1:])
    assert not is_written(value, written[:-1])


def test_values_that_are_no_texts_are_not_looked_for() -> None:
    assert all(is_written(value, "") for value in (1, 2.5, True, None))


def test_all_keys_and_values_are_given() -> None:
    assert list(values_in({"a": [1, {"b": ("c", None)}], "d": {}})) == ["a", 1, "b", "c", None, "d"]


def test_texts_in_messages_are_cut_at_forty_characters() -> None:
    assert short("x" * 40) == repr("x" * 40)
    assert short("x" * 41) == repr("x" * 37 + "...")


def test_fields_are_called_by_what_stands_in_them() -> None:
    message = {**calling({}, {}), "content": " b\n", "reasoning_content": "t"}
    fields = ["the text", "the reasoning", "the name of tool call 2", "an argument of tool call 1"]
    assert [value_of(field, message) for field in fields] == ["'b'", "'t'", "the tool call 'f1'", fields[-1]]


@pytest.mark.parametrize("blank", ["", " \n", None])
def test_an_answer_is_empty_that_has_neither_text_nor_thought_nor_call(blank: str | None) -> None:
    empty: Message = {"role": "assistant", "content": blank, "reasoning_content": blank, "tool_calls": []}
    assert is_empty(empty)
    calls = calling({})["tool_calls"]
    assert not any(map(is_empty, (empty | {"content": "b"}, empty | {"reasoning_content": "t"})))
    assert not is_empty(empty | {"tool_calls": calls})
    assert with_sentinels(empty).fields == {}
    assert shape_of(empty) == shape_of({"role": "assistant"}) != shape_of(TEXT)


WHAT = ("the name", "an argument")


def test_each_field_gets_a_sentinel_of_its_type_and_keys_those_of_their_order() -> None:
    arguments = {"b": 1, "A": 2.5, "c": ["x", True, None, "", {"d": "y"}]}
    answer = with_sentinels({**calling(arguments, "{}"), "reasoning_content": "t"})
    first, second = answer.message["tool_calls"]
    own = first["function"]["arguments"]
    one, two, three = own
    assert sorted(own) == [two, one, three]
    assert type(own[one]) is int
    assert type(own[two]) is float
    assert not own[two].is_integer()  # which a template might write as an int
    text, *same, inner = own[three]
    assert same == [True, None, ""]
    found = [*answer.fields]
    assert len(set(found)) == len(found) == 13
    wanted = [answer.message["reasoning_content"], answer.message["content"], first["function"]["name"]]
    wanted += [two, one, three, str(own[one]), str(own[two]), text, *values_in(inner)]
    wanted += [second["function"]["name"], second["function"]["arguments"]]
    assert found == wanted
    assert not set(found) & {"t", "b", "f0", "f1", "x", "y", "{}"}
    names = ["the reasoning", "the text", *(f"{what} of tool call {n}" for n in (1, 2) for what in WHAT)]
    assert list(dict.fromkeys(answer.fields.values())) == names
    assert first["type"] == "function"
    bare = {**TEXT, "tool_calls": [{"function": {"name": "f"}}]}
    assert with_sentinels(bare).message["tool_calls"] == [{"function": {"name": "Xq0001qX"}}]


def test_answers_of_a_shape_differ_in_texts_and_numbers_alone() -> None:
    def shape(*arguments: Any) -> Any:
        return shape_of(calling(*arguments))

    assert shape({"a": 1, "b": ["x"]}) == shape({"c": 2, "d": ["y"]})
    different = [{"a": 1}, {"a": 1.0}, {"a": "x"}, {"a": ""}, {"a": True}, {"a": False}, {"a": None}, {}, [], ["a"]]
    different += [{"a": 1, "b": 2.0}, {"b": 1, "a": 2.0}, {"a": {"b": "x"}}, {"a": ["x"]}, {"a": ["x", "x"]}]
    shapes = [shape(own) for own in different]
    assert not [(a, b) for a in range(len(shapes)) for b in range(a) if shapes[a] == shapes[b]]
    assert shape({}, {}) != shape({}) != shape_of(TEXT) != shape_of(THOUGHT)
