"""The oracle of other turns finds what is trained besides them, and passes what is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from lightning_sft.types import Conversation, Example
from tests.oracle.inference import Inference
from tests.oracle.kinds import TEXTS, answer, system, user
from tests.oracle.outcomes import Case
from tests.oracle.prompts import only, outcome
from tests.oracle.templates import of_trl

TURNS = [system("Be kind."), *TEXTS["turns"]]
Change = Callable[[str, int, int], tuple[int, int]]


def trained(case: Case, given: Conversation, turn: int, change: Change) -> Case:
    """A case whose sequences train another part of what the next answer is given."""

    def encode(conversation: Conversation) -> list[Example]:
        inference = Inference(case.tokenizer, conversation.messages, None, {})
        text, own = inference.prompt(turn + 1), conversation.messages[turn]["content"]
        begin = text.rindex(own)
        begin, end = change(text, begin, begin + len(own))
        ids, before = (list(case.tokenizer(text[:place])["input_ids"]) for place in (end, begin))
        return [Example(ids, [float(place >= len(before)) for place in range(len(ids))])]

    case.encode = encode  # type: ignore[method-assign]  # the mutation
    return case


CHANGES: dict[str, tuple[str, Change, str]] = {
    "its text alone": ("qwen3", lambda text, begin, end: (begin, end), ""),
    "its header and what closes it": (
        "qwen3",
        lambda text, begin, end: (text.rindex("<|im_start|>user", 0, begin), text.index("<|im_end|>", end) + 10),
        "",
    ),
    "a part of its text": ("qwen3", lambda text, begin, end: (begin + 1, end), "has no"),
    "the answer before": (
        "qwen3",
        lambda text, begin, end: (text.rindex("<|im_start|>assistant", 0, begin), end),
        "of turn 3",
    ),
    "what stops the answer before": (
        "qwen3",
        lambda text, begin, end: (text.rindex("<|im_end|>", 0, begin), end),
        "before its own text",
    ),
    "what stops the answer before, and begins it": (
        "glm4moe",
        lambda text, begin, end: (text.rindex("<|user|>", 0, begin), end),
        "stops the answer before",
    ),
    "the header of the next answer": (
        "qwen3",
        lambda text, begin, end: (begin, text.index("<|im_start|>", end) + 12),
        "where the next turn begins",
    ),
    "the name of who answers": ("qwen3", lambda text, begin, end: (begin, len(text)), "continues with words"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_trained_besides_a_turn_is_found(what: str) -> None:
    name, change, said = CHANGES[what]
    case, given = Case(of_trl()[name]), Conversation(TURNS, provenance="f:1")
    found = outcome(trained(case, given, 3, change), given, 3)
    assert (found.of, said in found.said) == ("wrong" if said else "exact", True), found


def test_a_preamble_of_the_template_is_found() -> None:
    case = Case(of_trl()["cohere2"])
    given = Conversation([system("Be kind."), user("Hi"), answer("Yo")], provenance="f:1")
    encode = case.encode
    assert outcome(case, given, 0).of == "exact"

    def with_all(other: Conversation) -> list[Example]:
        [example] = encode(other)
        return [replace(example, target_weights=[0.0, *[1.0] * (len(example.input_ids) - 1)])]

    case.encode = with_all  # type: ignore[method-assign]  # the mutation
    assert "words besides its own" in outcome(case, given, 0).said


def test_another_context_is_found() -> None:
    case, given = Case(of_trl()["qwen3"]), Conversation(TURNS, provenance="f:1")
    [example] = case.encode(only(given, 3))
    ids = [*example.input_ids[:2], 7, *example.input_ids[3:]]
    case.encode = lambda other: [replace(example, input_ids=ids)]  # type: ignore[method-assign]  # the mutation
    assert "not those that the next answer is given" in outcome(case, given, 3).said
