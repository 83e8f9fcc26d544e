"""Which rows have the right targets, by the oracle of the tests: it knows nothing of the systems, ours included."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from lightning_sft.types import IGNORE, Conversation, Example
from tests.oracle.families import family_of
from tests.oracle.judge import WrongError, judge

Verdict = tuple[Literal["right", "wrong", "refused"], str]


def verdicts(
    tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Conversation], rows: Sequence[Any]
) -> list[Verdict]:
    """A verdict on each row, with what is wrong about it.

    Blanks that end the generation prompt or stand behind a stop token may be trained or not: no answer begins before
    the first, and generation has ended at the second.

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
    header = _header(tokenizer)
    blanks = sum(1 for _ in takewhile(partial(_is_blank, tokenizer), reversed(header)))
    for n, token in enumerate(input_ids):
        is_behind = token in stops or (is_behind and _is_blank(tokenizer, token))
        if is_behind and token not in stops:
            weights[n] = 0.0
        if blanks and input_ids[n + 1 - len(header) : n + 1] == header:
            weights[n + 1 - blanks : n + 1] = [0.0] * blanks
    return Example(input_ids, weights)


def _header(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What the template writes before an answer."""
    turn = [{"role": "user", "content": "?"}]
    short, long = (
        tokenizer.apply_chat_template(turn, add_generation_prompt=prompts, return_dict=False)
        for prompts in (False, True)
    )
    return list(long[len(short) :])


def _is_blank(tokenizer: PreTrainedTokenizerFast, token: int) -> bool:
    return not tokenizer.decode([token]).strip()
