"""A model that writes what it was trained to write scores 100 %, and chat puts its answers back as training had them.

No real model: a stand-in generates the trained tokens of the last answer, and then others up to a stop token.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sft.data.batches.loader import PromptBatch
from lightning_sft.data.tokens.chat_template import ChatTemplate
from lightning_sft.data.tokens.encode import encode_prompt
from lightning_sft.data.tokens.template_config import configure
from lightning_sft.demos import tiny_model
from lightning_sft.evaluation.answer_scores import scores
from lightning_sft.evaluation.generation import answers
from lightning_sft.types import Conversation
from tests.helpers.slow import slow_but
from tests.oracle.judge import last_answer
from tests.oracle.kinds import user
from tests.oracle.outcomes import Case
from tests.oracle.templates import of_trl

SPACED = ("idefics3", "llava_next", "smolvlm")
"""They write no thoughts, and a space before an answer: behind a thought, that space may be the answer's own."""

QUICK = ("qwen3", "gptoss", "cohere2", "glm4moe", "llama3", "deepseek_r1_distill", "gemma")
ANSWERS = (
    "plain",
    "system",
    "turns",
    "thought",
    "inline thought",
    "empty",
    "space",
    "forged by user",
    "stop in answer",
)
CHATTED = tuple(kind for kind in ANSWERS if kind != "stop in answer")  # decoded, a stop and its text are the same
CALLS = ("call", "calls", "call and text", "types", "tool", "thought tool")
BEYOND = 40  # a token that stops nothing


def trained(name: str, kinds: tuple[str, ...]) -> Iterator[tuple[str, Case, Conversation, list[int]]]:
    """The kinds of conversations that a template can train, with the ids that are trained of their last answer."""
    case = Case(of_trl()[name])
    configure(case.tokenizer, case.config)
    for kind in kinds:
        given = case.conversation(kind)
        found = case.encoded(given)
        ids = None if found.refusal else last_answer(case.tokenizer, given, found.examples)
        if ids is not None:
            yield kind, case, given, ids


class Perfect:
    """Stands in for ``generate``: it generates the answer, and then other tokens up to a stop token."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer

    def __call__(self, input_ids: Tensor, **settings: Any) -> Tensor:
        return torch.cat([input_ids, torch.tensor([[*self.answer, BEYOND, BEYOND]])], 1)


@pytest.mark.parametrize("name", slow_but(QUICK, of_trl()))
def test_a_perfect_model_scores_a_hundred_percent(name: str) -> None:
    model: Any = tiny_model()
    model.generation_config.eos_token_id = None  # its ids are those of another vocabulary
    wrong = {}
    for kind, case, given, ids in trained(name, ANSWERS + CALLS):
        assert case.tokenizer.decode([BEYOND]) not in case.stops
        model.generate = Perfect(ids)
        prompt = encode_prompt(given, case.tokenizer)
        [row] = answers(model, PromptBatch([prompt], case.tokenizer), 4096)
        found = scores([row["prediction"]], [row["reference"]], None, False, False)
        if found["exact_match"] != 1 or found["normalized_match"] != 1:
            wrong[kind] = row
    assert wrong == {}


@pytest.mark.parametrize("name", slow_but(QUICK, of_trl()))
def test_chat_puts_an_answer_back_as_training_has_it(name: str) -> None:
    """The prompt of the next turn is that of a row in which the answer was trained.

    Two rows may train the same tokens, one with a thought in its text and one with it as its reasoning. They may have
    other prompts later on, and nobody can say which of them the model had.
    """
    prompts: dict[str, list[list[int]]] = {}
    found = []
    for kind, case, given, ids in trained(name, tuple(k for k in CHATTED if name not in SPACED or k != "thought")):
        before, encode = given.messages[:-1], partial(next_prompt, case)
        key = repr((before, ids))
        prompts.setdefault(key, []).append(encode(before, given.messages[-1]))
        message = ChatTemplate.of(case.tokenizer).message_of(before, case.tokenizer.decode(ids))
        found.append((kind, key, encode(before, message), message))
    assert [(kind, message) for kind, key, prompt, message in found if prompt not in prompts[key]] == []


def next_prompt(case: Case, before: list[Any], answer: Any) -> list[int]:
    return list(encode_prompt(Conversation([*before, answer, user("And?")]), case.tokenizer).input_ids)
