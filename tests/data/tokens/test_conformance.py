"""Vendors' chat templates: exact, or refused; the matrix in docs is what comes out."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_sft.data.tokens.encode import encode
from lightning_sft.types import Example
from tests.conformance import (
    CONVERSATIONS,
    assert_parity,
    conversation,
    outcome,
    page,
    templates,
    tokenizer_for,
)


@pytest.mark.parametrize("name", templates())
def test_every_conversation_is_exact_or_refused_for_a_known_reason(name: str) -> None:
    tokenizer = tokenizer_for(templates()[name])
    for kind in CONVERSATIONS:
        outcome(kind, tokenizer)  # asserts parity, or finds the reason of the refusal among the known ones


def test_the_page_is_what_comes_out() -> None:
    written = (Path(__file__).parents[3] / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m tests.conformance > docs/conformance.md"


def test_a_wrong_mask_or_context_would_be_caught() -> None:
    tokenizer = tokenizer_for(templates()["qwen3"])
    given = conversation("turns", tokenizer)
    examples = encode(given, tokenizer)
    assert_parity(given, examples, tokenizer)
    ids, weights = list(examples[0].input_ids), list(examples[0].target_weights)
    wrong = [
        Example(ids, [*weights[1:], 0.0]),  # one token too early
        Example(ids, [0.0, *weights[:-1]]),  # one too late
        Example(ids, [*weights[:-1], 0.0]),  # the stop token is not trained
        Example(ids, [1.0] * len(ids)),  # the prompt is trained
        Example([ids[1], *ids[1:]], weights),  # another context
    ]
    for example in wrong:
        with pytest.raises(AssertionError):
            assert_parity(given, [example, *examples[1:]], tokenizer)
