"""Which rows have the right targets, by the oracle of the tests: it knows nothing of the systems, ours included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from lightning_sft.types import IGNORE, Conversation, Example
from tests.oracle.families import family_of
from tests.oracle.judge import WrongError, judge

Verdict = tuple[Literal["right", "wrong", "refused"], str]


def verdicts(
    tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Conversation], rows: Sequence[Any]
) -> list[Verdict]:
    """A verdict on each row, with what is wrong about it; blanks that are trained behind a stop token change nothing.

    Args:
        tokenizer: Tokenizer with the chat template.
        conversations: What the rows say.
        rows: Of each row the sequences, with ``input_ids`` and ``labels``; or why there are none.
    """
    return [_verdict(tokenizer, *pair) for pair in zip(conversations, rows, strict=True)]


def _verdict(tokenizer: PreTrainedTokenizerFast, conversation: Conversation, sequences: Any) -> Verdict:
    if isinstance(sequences, str):
        return "refused", sequences
    try:
        judge(tokenizer, conversation, [_example(tokenizer, **sequence) for sequence in sequences])
    except WrongError as error:
        return "wrong", str(error)
    return "right", ""


def _example(tokenizer: PreTrainedTokenizerFast, input_ids: list[int], labels: list[int]) -> Example:
    """A sequence whose labels are its own tokens, at their own positions; the first is never a target."""
    if any(label not in (IGNORE, token) for token, label in zip(input_ids, labels, strict=True)):
        raise ValueError("A label is another token than the one at its position.")
    weights = [0.0, *(float(label != IGNORE) for label in labels[1:])]
    names = {tokenizer.eos_token, *family_of(str(tokenizer.chat_template)).stops}
    stops, is_behind = set(tokenizer.convert_tokens_to_ids(sorted(filter(None, names)))), False
    for n, token in enumerate(input_ids):
        is_behind = token in stops or (is_behind and not tokenizer.decode([token]).strip())
        if is_behind and token not in stops:
            weights[n] = 0.0  # generation has ended
    return Example(input_ids, weights)
