"""Conversations to token ids and target weights, built together: the mask is never searched for afterwards.

Parity is the rule. The context of an answer is what the model gets at inference, token for token:
``apply_chat_template(messages before it, add_generation_prompt=True)``. The answer is what the template puts after
that, up to and with its stop token. Answers share one sequence as long as each finds its own context in it; where the
template renders the past differently from a later turn, a new sequence begins. What cannot be had this way is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lightning_sft.types import Conversation, Example, InputError, Message, Normalize, Prompt


def encode(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, normalize: Normalize = "token"
) -> list[Example]:
    """The training sequences of a conversation: one, or more where the template rewrites earlier turns.

    Args:
        conversation: Every assistant turn with a positive weight is a target.
        tokenizer: With a chat template.
        normalize: ``sequence`` divides an answer's weight by its number of tokens.

    Raises:
        InputError: When there is no answer, or parity cannot be had.

    >>> from lightning_sft.demos import tiny_tokenizer
    >>> tokenizer = tiny_tokenizer()
    >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    >>> [example] = encode(Conversation(turns, weights=[0, 1]), tokenizer)
    >>> tokenizer.decode([i for i, w in zip(example.input_ids, example.target_weights) if w > 0])
    'Yo<|im_end|>'
    """
    weights = conversation.weights or [float(m["role"] == "assistant") for m in conversation.messages]
    turns = [turn for turn, m in enumerate(conversation.messages) if m["role"] == "assistant" and weights[turn] > 0]
    if not turns:
        raise InputError(f"{conversation.provenance}: the row has no answer: no assistant turn with a weight.")
    special = _special_pattern(tokenizer)
    _refuse_control_tokens(conversation, special)
    examples: list[Example] = []
    ids: list[int] = []
    target_weights: list[float] = []
    for turn in turns:
        context, answer = _context_and_answer(conversation, turn, tokenizer, special)
        if context[: len(ids)] != ids:  # seen from here, the past is not what the earlier answers were trained in
            examples.append(Example(ids, target_weights, conversation.provenance))
            ids, target_weights = [], []
        weight = weights[turn] / len(answer) if normalize == "sequence" else weights[turn]
        target_weights = target_weights + [0.0] * (len(context) - len(ids)) + [weight] * len(answer)
        ids = context + answer
    return [*examples, Example(ids, target_weights, conversation.provenance)]


def encode_prompt(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """What the model is given at inference for the last answer of a conversation, and that answer.

    Raises:
        InputError: When the template cannot render it.
    """
    messages, reference = list(conversation.messages), None
    if messages[-1]["role"] == "assistant":
        reference = messages.pop()["content"]
    _refuse_control_tokens(conversation, _special_pattern(tokenizer))
    text = _render(conversation, messages, tokenizer, generation=True)
    return Prompt(_token_ids(text, tokenizer), reference, conversation.provenance)


def _context_and_answer(
    conversation: Conversation, turn: int, tokenizer: PreTrainedTokenizerBase, special: re.Pattern[str]
) -> tuple[list[int], list[int]]:
    where = f"{conversation.provenance}: turn {turn + 1}"
    content = conversation.messages[turn]["content"].strip()
    if not content:
        raise InputError(f"{where}: the answer is empty. Remove the row, or give the answer a text.")
    prompt = _render(conversation, conversation.messages[:turn], tokenizer, generation=True)
    rendered = _render(conversation, conversation.messages[: turn + 1], tokenizer, generation=False)
    if not rendered.startswith(prompt):
        raise InputError(
            f"{where}: what the chat template puts before an answer is not what it puts before a generated one, so "
            "the answer would be trained in a context that the model never gets. Give a template where both agree: "
            "data.chat_template."
        )
    if content not in rendered[len(prompt) :]:
        raise InputError(f"{where}: the chat template does not render the answer's text as it is.")
    end = _end_of_answer(rendered, len(prompt), content, special)
    if end is None:
        raise InputError(
            f"{where}: the chat template puts no stop token after the answer, so the model would never learn to stop. "
            "Add the end-of-turn token to the template: data.chat_template."
        )
    context = _token_ids(prompt, tokenizer)
    both = _token_ids(rendered[:end], tokenizer)
    if both[: len(context)] == context:
        return context, both[len(context) :]
    answer = _token_ids(rendered[len(prompt) : end], tokenizer)  # the boundary merges: the prompt stays itself
    if tokenizer.decode(context + answer) != tokenizer.decode(both):
        raise InputError(f"{where}: the tokenizer cannot tokenise the answer apart from the prompt before it.")
    return context, answer


def _end_of_answer(rendered: str, begin: int, content: str, special: re.Pattern[str]) -> int | None:
    """Where the stop token ends: the special token after the last stretch between special tokens with the content."""
    end = None
    for token in special.finditer(rendered, begin):
        if content in rendered[begin : token.start()]:
            end = token.end()
        begin = token.end()
    return end


def _render(
    conversation: Conversation, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, generation: bool
) -> str:
    tools: Any = conversation.tools
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=generation
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise InputError(f"{conversation.provenance}: the chat template refuses the conversation: {error}") from error
    return str(text)


def _token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    longest_first = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


def _refuse_control_tokens(conversation: Conversation, special: re.Pattern[str]) -> None:
    for turn, message in enumerate(conversation.messages, 1):
        if found := special.search(message["content"]):
            raise InputError(
                f"{conversation.provenance}: turn {turn} ({message['role']}) contains the control token "
                f"{found.group()!r}, which would begin or end a turn. Remove it from the text."
            )
