"""Conversations to token ids and target weights, built together: the mask is never searched for afterwards.

Parity is the rule. The context of an answer is what the model gets at inference, token for token:
``apply_chat_template(messages before it, add_generation_prompt=True)``. Answers share a sequence as long as each finds
its own context in it; where the template renders the past differently from a later turn, a new sequence begins. What
cannot be encoded this way is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lightning_sft.data.tokens.chat_template import ChatTemplate, in_time, texts_in
from lightning_sft.objective import target_weight
from lightning_sft.types import Conversation, Example, InputError, Normalize, Prompt


def encode(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, normalize: Normalize = "token"
) -> list[Example]:
    """The training sequences of a conversation: one, or more where the template rewrites earlier turns.

    Args:
        conversation: Every assistant turn with a positive weight is a target; a lone ``text`` is one altogether.
        tokenizer: Tokenizer with a chat template.
        normalize: ``sequence`` divides an answer's weight by its number of tokens, ``sqrt`` by the root of it.

    Raises:
        InputError: When there is no answer, parity is not possible, or the template renders for too long.

    >>> from lightning_sft.demos import tiny_tokenizer
    >>> tokenizer = tiny_tokenizer()
    >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    >>> [example] = encode(Conversation(turns, weights=[0, 1]), tokenizer)
    >>> tokenizer.decode([i for i, w in zip(example.input_ids, example.target_weights) if w > 0])
    'Yo<|im_end|>'
    """
    [result] = encode_many([conversation], tokenizer, normalize)
    if isinstance(result, InputError):
        raise result
    return result


def encode_many(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, normalize: Normalize = "token"
) -> list[list[Example] | InputError]:
    """The same for many at once, with one call of the tokenizer; a refusal stands in the place of its sequences."""
    template = ChatTemplate.of(tokenizer)
    drafts = [_drafted(conversation, template) for conversation in conversations]
    texts = [text for draft in drafts if isinstance(draft, list) for answer in draft for text in answer.texts]
    ids = iter(template.token_ids(texts))
    results: list[list[Example] | InputError] = []
    for conversation, draft in zip(conversations, drafts, strict=True):
        if isinstance(draft, InputError):
            results.append(draft)
            continue
        pairs = [(next(ids), next(ids)) for _ in draft]  # all are taken from the iterator, also before a refusal
        try:
            results.append(list(_assemble(conversation, draft, pairs, template, normalize)))
        except InputError as error:
            results.append(error)
    return results


def encode_prompt(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The prompt at inference for the last answer of a conversation, and that answer.

    Raises:
        InputError: When the template cannot render it.
    """
    template, messages, reference = ChatTemplate.of(tokenizer), list(conversation.messages), None
    if messages[-1]["role"] == "assistant":
        reference = messages.pop()["content"]
    try:
        if messages and messages[-1]["role"] == "text":
            raise InputError("a plain text has no prompt to answer. Give rows with prompts.")
        _refuse_control_tokens(conversation, template)
        with in_time():
            text = template.render(messages, conversation.tools, generation=True)
        [ids] = template.token_ids([text])
    except (InputError, TimeoutError) as error:
        raise InputError(f"{conversation.provenance}: {error}") from error
    return Prompt(ids, reference, conversation.provenance)


@dataclass(frozen=True)
class _Answer:
    """One answer as text: its turn and weight, what stands before it, and itself with its stop token."""

    turn: int
    weight: float
    prompt: str
    text: str

    @property
    def texts(self) -> tuple[str, str]:
        return self.prompt, self.prompt + self.text


def _drafted(conversation: Conversation, template: ChatTemplate) -> list[_Answer] | InputError:
    """The same as :func:`_draft`; a template that takes too long stops everything.

    Raises:
        InputError: Then.
    """
    try:
        with in_time():
            return _draft(conversation, template)
    except TimeoutError as error:
        raise InputError(f"{conversation.provenance}: {error}.") from error


def _draft(conversation: Conversation, template: ChatTemplate) -> list[_Answer] | InputError:
    """The answers of a conversation as text, or why it cannot be used."""
    where, messages = conversation.provenance, conversation.messages
    weights = conversation.weights or [float(message["role"] in ("assistant", "text")) for message in messages]
    answers: list[_Answer] = []
    try:
        _refuse_control_tokens(conversation, template)
        for turn, (message, weight) in enumerate(zip(messages, weights, strict=True)):
            where = f"{conversation.provenance}: turn {turn + 1}"
            if weight > 0 and message["role"] == "text":
                if not message["content"].strip():
                    raise InputError("the text is empty. Remove the row.")
                answers.append(_Answer(turn, weight, template.beginning, message["content"] + template.end))
            elif weight > 0 and message["role"] == "assistant":
                if not message["content"].strip() and not message.get("tool_calls"):
                    raise InputError("the answer is empty. Remove the row, or give the answer a text.")
                texts = template.prompt_and_answer(messages[: turn + 1], conversation.tools)
                answers.append(_Answer(turn, weight, *texts))
            elif weight > 0:
                raise InputError(
                    f"a {message['role']} turn has the weight {weight}; only an assistant's can be trained."
                )
    except InputError as error:
        return InputError(f"{where}: {error}")
    if not answers:
        if any(message["role"] in ("assistant", "text") for message in messages):
            why = "all its answers have the weight 0, so nothing would be trained. Remove the row, or give one a weight"
        else:
            why = "the row has no answer: no assistant turn"
        return InputError(f"{conversation.provenance}: {why}.")
    return answers


def _assemble(
    conversation: Conversation,
    answers: Sequence[_Answer],
    pairs: Sequence[tuple[list[int], list[int]]],
    template: ChatTemplate,
    normalize: Normalize,
) -> Iterator[Example]:
    """Sequences from the ids of each answer's prompt, and of prompt and answer together."""
    ids: list[int] = []
    target_weights: list[float] = []
    begin = 0
    for number, (answer, (context, both)) in enumerate(zip(answers, pairs, strict=True)):
        if both[: len(context)] == context:
            target = both[len(context) :]
        else:  # the boundary merges: the prompt stays what it is at inference, the answer is tokenized by itself
            [target] = template.token_ids([answer.text])
            if template.tokenizer.decode(context + target) != template.tokenizer.decode(both):
                raise InputError(
                    f"{conversation.provenance}: turn {answer.turn + 1}: the tokenizer cannot tokenize the answer "
                    "apart from the prompt before it."
                )
        if context[: len(ids)] != ids:  # seen from here, the past is not what the earlier answers were trained in
            yield Example(ids, target_weights, conversation.provenance, begin)
            ids, target_weights, begin = [], [], number
        weight = target_weight(normalize, len(target), answer.weight)
        target_weights = target_weights + [0.0] * (len(context) - len(ids)) + [weight] * len(target)
        target_weights[0] = 0.0  # the first token has no context: of a text, where nothing stands before it
        ids = context + target
    yield Example(ids, target_weights, conversation.provenance, begin)


def _refuse_control_tokens(conversation: Conversation, template: ChatTemplate) -> None:
    for turn, message in enumerate(conversation.messages, 1):
        for text in texts_in(message):
            if found := template.special.search(text):
                raise InputError(
                    f"turn {turn} ({message['role']}) contains the control token {found.group()!r}, which would begin "
                    "or end a turn. Remove it from the text."
                )
    for text in texts_in(conversation.tools or []):
        if found := template.special.search(text):
            raise InputError(f"a tool's description contains the control token {found.group()!r}. Remove it.")
