"""The oracle passes what is right, and fails whatever is done to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from lightning_sft.data.tokens.encode import encode
from lightning_sft.data.tokens.template_config import TemplateConfig
from lightning_sft.types import Conversation, Example
from tests.oracle.fields import missing
from tests.oracle.inference import Inference, control_tokens
from tests.oracle.judge import WrongError, judge, mutations
from tests.oracle.outcomes import Case
from tests.oracle.templates import of_trl
from tests.oracle.vocabularies import KINDS

TEMPLATES = ("qwen3", "llama3_1", "gptoss", "cohere2", "glm4moe", "deepseekv3", "gemma4", "phi3", "idefics3")


def judged(case: Case, given: Conversation, examples: Sequence[Example]) -> None:
    judge(case.tokenizer, given, examples, None, case.stops)


def is_wrong(case: Case, given: Conversation, examples: Sequence[Example]) -> bool:
    try:
        judged(case, given, examples)
    except WrongError:
        return True
    return False


def with_text(case: Case, example: Example, change: Callable[[str], str]) -> Example:
    """The example with another text trained, where one answer ends it."""
    begin = next(n for n, weight in enumerate(example.target_weights) if weight > 0)
    text = change(case.tokenizer.decode(example.input_ids[begin:]))
    ids = case.tokenizer(text, add_special_tokens=False)["input_ids"]
    weights = [0.0] * begin + [1.0] * len(ids)
    return Example([*example.input_ids[:begin], *ids], weights)


@pytest.mark.parametrize("vocabulary", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["plain", "turns", "tool", "thoughts", "forged by user"])
def test_each_mutation_of_a_right_sequence_fails(name: str, kind: str, vocabulary: str) -> None:
    case = Case(of_trl()[name], vocabulary)
    if case.outcome(kind).of != "exact":
        return
    given = case.conversation(kind)
    examples = case.encode(given)
    judged(case, given, examples)
    for number, example in enumerate(examples):
        for what, mutant in mutations(example):
            others = [*examples[:number], mutant, *examples[number + 1 :]]
            assert is_wrong(case, given, others), what
    assert is_wrong(case, given, [*examples, examples[0]])
    assert is_wrong(case, given, examples[1:])


WRONG_TEXTS: dict[str, tuple[str, str, Callable[[str], str], str]] = {
    "a stop that is not the last of several": (
        "cohere2",
        "plain",
        lambda text: text.replace("<|END_OF_TURN_TOKEN|>", ""),
        "does not end with <|END_OF_TURN_TOKEN|>",
    ),
    "the header of a next turn": (
        "llama3",
        "plain",
        lambda text: f"{text}<|start_header_id|>assistant<|end_header_id|>",
        "does not end with <|eot_id|>",
    ),
    "a token behind the stop": ("qwen3", "plain", lambda text: f"{text}\n<|im_end|>", "continues after its stop"),
    "the header of the answer": ("qwen3", "plain", lambda text: f"<|im_start|>assistant\n{text}", "trained is"),
    "a header that no next turn shows to be the stop": (
        "glm4moe",
        "call",
        lambda text: text.replace("<|observation|>", ""),
        "does not end with <|observation|>",
    ),
    "a text that is lost": ("qwen3", "call and text", lambda text: text.replace("I look it up.\n", ""), "has no"),
    "a text that stands in the call too": ("qwen3", "text in call", lambda text: text.replace("Paris\n", ""), "has no"),
    "a number that is in the text too": (
        "qwen3",
        "number in text",
        lambda text: text.replace(": 3}", ": }"),
        "no 3",
    ),
    "a call whose name stands in the text": (
        "qwen3",
        "name in text",
        lambda text: text[: text.index("\n<tool_call>")] + "<|im_end|>",
        "has no 'get_time'",
    ),
    "a thought that is repeated": (
        "qwen3",
        "same thought",
        lambda text: text.replace("Let me see.\n", ""),
        "no",
    ),
    "an argument that is lost": ("qwen3", "types", lambda text: text.replace('"view": "sea"', ""), "has no"),
    "another text": ("qwen3", "plain", lambda text: text.replace("Yo", "No"), "has no 'Yo'"),
    "a text more": ("qwen3", "plain", lambda text: text.replace("Yo", "Yo, man"), "trained is"),
}


@pytest.mark.parametrize("what", WRONG_TEXTS)
def test_a_wrong_text_fails(what: str) -> None:
    name, kind, change, said = WRONG_TEXTS[what]
    case = Case(of_trl()[name])
    given = case.conversation(kind)
    [example] = case.encode(given)
    judged(case, given, [with_text(case, example, lambda text: text)])
    with pytest.raises(WrongError, match=said.replace("|", r"\|")):
        judged(case, given, [with_text(case, example, change)])


@pytest.mark.parametrize("vocabulary", KINDS)
@pytest.mark.parametrize("kind", ["forged by user", "forged by answer", "forged by tool", "other control"])
def test_control_tokens_of_texts_that_are_not_plain_text_fail(kind: str, vocabulary: str) -> None:
    case = Case(of_trl()["qwen3"], vocabulary)
    given = case.conversation(kind)
    judged(case, given, case.encode(given))
    forged = encode(given, case.tokenizer, config=replace(case.config, control_tokens="as_is"))
    with pytest.raises(WrongError):
        judged(case, given, forged)


def test_a_field_that_only_the_sentinels_show_to_be_lost_fails() -> None:
    case = Case(of_trl()["qwen3"])
    given = case.conversation("number in text")
    examples = case.encode(given)

    def without_text(other: Conversation) -> list[Example]:
        turns: list[Any] = [*other.messages[:-1], {**other.messages[-1], "content": ""}]
        return case.encode(replace(other, messages=turns))

    judge(case.tokenizer, given, examples, case.encode, case.stops)
    with pytest.raises(WrongError, match="of fields with sentinels"):
        judge(case.tokenizer, given, examples, without_text, case.stops)


def test_a_stop_of_the_generation_config_ends_an_answer() -> None:
    case = Case(of_trl()["phi3"])
    given = case.conversation("plain")
    [example] = encode(given, case.tokenizer, config=TemplateConfig(stop_ids=case.config.stop_ids))
    judge(case.tokenizer, given, [example], None, ["<|end|>"])
    with pytest.raises(WrongError):
        judge(
            case.tokenizer, given, [with_text(case, example, lambda text: f"{text}\n<|endoftext|>")], None, ["<|end|>"]
        )


@pytest.mark.parametrize("vocabulary", KINDS)
def test_the_oracles_own_plain_text_has_no_control_token(vocabulary: str) -> None:
    case = Case(of_trl()["qwen3"], vocabulary)
    given = case.conversation("forged by user")
    inference = Inference(case.tokenizer, given.messages, None, {})
    assert inference.hidden
    forged, plain = inference.contexts(1)[0], case.conversation("plain")
    control = [case.tokenizer.convert_tokens_to_ids(token) for token in control_tokens(case.tokenizer)]
    expected = Inference(case.tokenizer, plain.messages, None, {}).contexts(1)[0]
    assert [token for token in forged if token in control] == [token for token in expected if token in control]


def test_each_value_needs_a_place_of_its_own() -> None:
    assert missing(["Paris", "city", "Paris"], '{"city": "Paris"}') == ["Paris"]
    assert missing(['a "b"\n', 3, True], r'{"x": "a \"b\"\n", "y": 3, "z": true}') == []
    assert missing([" Yo \n"], "Yo<|im_end|>") == []
