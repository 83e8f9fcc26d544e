"""Judges the training sequences of a conversation: exact, or in which way they are wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerFast

from lightning_sft.types import Conversation, Example, Message
from tests.oracle.endings import Ending, ending_of
from tests.oracle.fields import Marked, marked, missing
from tests.oracle.inference import Inference, control_tokens

TAG = re.compile(r"</?think(?:ing)?>|\[/?THINK\]|</?seed:think>|</?mm:think>|</?think:\w+>")
"""Begins or ends a thought."""

_TWO = re.compile(r"</(?:\w+:)?think[\w:]*>\s*<think>")
"""A thought that has ended, or of which the template writes the end alone, and another right after it."""

_INLINE = re.compile(r"(?s)<think>\s*(.*?)\s*</think>\s*(.*)")

Encode = Callable[[Conversation], Sequence[Example]]


class WrongError(AssertionError):
    """A training sequence teaches something else than the conversation says."""


@dataclass(frozen=True)
class Span:
    """Trained tokens of one answer: ``input_ids[begin:end]`` of an example."""

    example: Example
    begin: int
    end: int

    @property
    def ids(self) -> list[int]:
        return list(self.example.input_ids[self.begin : self.end])


def judge(
    tokenizer: PreTrainedTokenizerFast,
    conversation: Conversation,
    examples: Sequence[Example],
    encode: Encode | None = None,
    stops: Sequence[str] = (),
) -> None:
    """Hold the sequences of a conversation against what a server would render and generate.

    Args:
        tokenizer: Tokenizer with a chat template.
        conversation: The conversation.
        examples: What ``encode`` has made of it.
        encode: Encodes the same conversation with sentinels; ``None`` leaves that out.
        stops: Tokens that generation stops at by the model's generation config, besides the tokenizer's EOS.

    Raises:
        WrongError: When an answer is trained in another context than it would be generated in, loses a field, does not
            end at its stop, or has more than the answer; or when anything else is trained.
    """
    inference = inference_of(tokenizer, conversation)
    known = [token for token in (tokenizer.eos_token, *stops) if token]
    spans = _spans(conversation, inference, examples)
    other = with_sentinels(tokenizer, conversation)
    sentinels = inference_of(tokenizer, other.conversation)
    for turn, span in spans.items():
        try:
            ending, marks = ending_of(inference, turn, known), ending_of(sentinels, turn, known)
        except Exception as error:
            raise WrongError(f"turn {turn + 1} is trained, but the template raises {error!r}") from error
        _judge_answer(inference, turn, span, ending, marks)
    if encode is not None and spans:
        _judge_sentinels(tokenizer, other, encode)


def as_meant(tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> Conversation:
    """The conversation with its thoughts in texts as reasoning, if its template writes an empty thought before one."""
    inference = inference_of(tokenizer, conversation)
    with suppress(Exception):  # of the template, which the encoder refuses
        wholes = [inference.text(turn + 1, generation=False) for turn in trained_turns(conversation)]
        if any(_TWO.search(whole) for whole in wholes):
            return replace(conversation, messages=list(map(_taken_apart, conversation.messages)))
    return conversation


def _taken_apart(message: Message) -> Message:
    found = _INLINE.fullmatch(message["content"]) if message["role"] == "assistant" else None
    return {**message, "reasoning_content": found[1], "content": found[2]} if found else message


def last_answer(
    tokenizer: PreTrainedTokenizerFast, conversation: Conversation, examples: Sequence[Example]
) -> list[int] | None:
    """The trained ids of the last turn; ``None`` where that is not trained."""
    turn = len(conversation.messages) - 1
    if turn not in trained_turns(conversation):
        return None
    return _spans(conversation, inference_of(tokenizer, conversation), examples)[turn].ids


def trained_turns(conversation: Conversation) -> list[int]:
    """The turns that have to be trained: answers with a weight, but not one that opens the conversation."""
    weights = conversation.weights or [1.0] * len(conversation.messages)
    turns = enumerate(zip(conversation.messages, weights, strict=True))
    return [turn for turn, (message, weight) in turns if turn and message["role"] == "assistant" and weight > 0]


def with_sentinels(tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> Marked:
    """The conversation with a sentinel in each field of each answer."""
    return marked(conversation, re.compile("|".join(map(re.escape, control_tokens(tokenizer))) or r"(?!)"))


def inference_of(tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> Inference:
    """The conversation as a server renders it."""
    variables = getattr(conversation, "template_kwargs", {})
    return Inference(tokenizer, conversation.messages, conversation.tools, variables)


def _spans(conversation: Conversation, inference: Inference, examples: Sequence[Example]) -> dict[int, Span]:
    """The trained tokens of each answer, found by its context."""
    begins: dict[int, tuple[Example, int]] = {}
    for turn in trained_turns(conversation):
        try:
            contexts = inference.contexts(turn)
        except Exception as error:
            raise WrongError(
                f"turn {turn + 1}: the template raises on its prompt, {error!r}, and yet is trained"
            ) from error
        found = {
            (number, len(context))
            for number, example in enumerate(examples)
            for context in contexts
            if list(example.input_ids[: len(context)]) == context and sum(example.target_weights[len(context) :][:1])
        }
        if len(found) > 1:  # a context may begin within a trained answer
            found = {(number, begin) for number, begin in found if not examples[number].target_weights[begin - 1]}
        if len(found) != 1:
            raise WrongError(f"turn {turn + 1} is trained {len(found)} times in the context that inference gives it")
        [(number, begin)] = found
        begins[turn] = (examples[number], begin)
    spans = {}
    for turn, (example, begin) in begins.items():
        weights = list(example.target_weights)
        zero = next((n for n in range(begin, len(weights)) if weights[n] == 0), len(weights))
        others = [other for own, other in begins.values() if own is example and other > begin]
        spans[turn] = Span(example, begin, min([zero, *others]))
    trained = sum(sum(weight != 0 for weight in example.target_weights) for example in examples)
    if trained != sum(span.end - span.begin for span in spans.values()):
        raise WrongError(f"{trained} tokens are trained, and the answers behind their contexts have another number")
    for span in spans.values():
        if len({span.example.target_weights[n] for n in range(span.begin, span.end)}) != 1:
            raise WrongError("tokens of one answer have different weights")
    return spans


def _judge_answer(inference: Inference, turn: int, span: Span, ending: Ending, marks: Ending) -> None:
    tokenizer, where = inference.tokenizer, f"turn {turn + 1}"
    context, ids = list(span.example.input_ids[: span.begin]), span.ids
    text = _decoded(tokenizer, context, ids)
    if not ending.stops:
        raise WrongError(f"{where}: nothing that generation could stop at follows it, and yet {text!r} is trained")
    stops = marks.stops or ending.stops
    stop_ids = {tokenizer.convert_tokens_to_ids(token) for token in stops}
    if ids[-1] not in stop_ids:
        raise WrongError(f"{where}: {text!r} does not end with {' or '.join(stops)}")
    if stop_ids & set(ids[:-1]):
        raise WrongError(f"{where}: {text!r} continues after its stop")
    values = [inference.shown(value) if isinstance(value, str) else value for value in inference.fields(turn)]
    if lost := missing(values, text):
        raise WrongError(f"{where}: {text!r} has no {lost[0]!r}")
    if ending.own is not None:
        _judge_tokens(inference, turn, context, ids, ending.own)
    else:
        _judge_rest(inference, turn, text, _decoded(tokenizer, context, ids[:-1]), values, ending, marks)


def _judge_tokens(inference: Inference, turn: int, context: list[int], ids: list[int], own: str) -> None:
    """The ids are those of the text that the template writes, behind the prompt or by itself."""
    tokenizer, where = inference.tokenizer, f"turn {turn + 1}"
    before = inference.ids(inference.prompt(turn)) if inference.hidden else context
    whole = inference.ids(inference.prompt(turn) + own)
    reaches_over = whole[: len(before)] != before
    expected = inference.ids(own) if reaches_over else whole[len(before) :]
    is_same = list(ids) == list(expected)
    if inference.hidden or reaches_over:  # plain text is tokenized apart, or the answer from its prompt
        added = tokenizer.added_tokens_decoder
        is_same = [n for n in ids if n in added] == [n for n in expected if n in added]
        is_same = is_same and _squeezed(_decoded(tokenizer, context, ids)) == _squeezed(inference.shown(own))
    if reaches_over and not inference.hidden:
        is_same = is_same and _decode(tokenizer, context + ids) == _decode(tokenizer, whole)
    if not is_same:
        given, wanted = _decoded(tokenizer, context, ids), inference.shown(own)
        raise WrongError(
            f"{where}: trained is {given!r}, the template writes {wanted!r}, as tokens {ids} and {expected}"
        )


def _judge_rest(
    inference: Inference, turn: int, whole: str, text: str, values: Sequence[object], ending: Ending, marks: Ending
) -> None:
    """Whatever is trained beside the fields and the stop is what the template writes, or a tag of a thought."""
    where, rest = f"turn {turn + 1}", text
    written, head, tail = (inference.shown(part) for part in (ending.written, marks.head, ending.tail))
    problem = _thought_problem(inference.prompt(turn), text, written)
    if problem:
        raise WrongError(f"{where}: {text!r} {problem}")
    tails = [_squeezed(tail), *([] if "zqv" in marks.tail else [_squeezed(marks.tail)])]
    if not any(map(_squeezed(whole).endswith, tails)):
        raise WrongError(f"{where}: {whole!r} does not end as the template writes it, with {tail!r}")
    markers = control_tokens(inference.tokenizer)
    begun = inference.prompt(turn).rpartition(["\0", *inference.texts_before(turn)][-1])[2][-200:]
    if left := [token for token in markers if token in head and _squeezed(token) not in _squeezed(text + begun)]:
        raise WrongError(f"{where}: {text!r} has no {left[0]}, which the template writes before it")
    rest = rest.replace("▁", " ")
    for value in sorted((str(value).replace("▁", " ") for value in values), key=len, reverse=True):
        rest = rest.replace(value, "\x00", 1) if value in rest else rest.replace(value.strip(), "\x00", 1)
    rest = TAG.sub("\x00", rest)
    for piece in rest.split("\x00"):
        if _squeezed(piece) not in _squeezed(written):
            raise WrongError(f"{where}: {text!r} has {piece!r}, which the template does not write in an answer")
    foreign = [token for token in markers if token in rest and token not in written]
    if foreign:
        raise WrongError(f"{where}: {text!r} has {foreign[0]} in it")


def _thought_problem(prompt: str, text: str, written: str) -> str:
    """What is wrong with the tags of thoughts in an answer."""
    last, tags = re.search(rf"({TAG.pattern})\s*\Z", prompt), ["/" in tag for tag in TAG.findall(text)]
    if last is None:
        is_own = TAG.findall(text) == TAG.findall(written)
        return "" if is_own or tags == [False, True] * (len(tags) // 2) else "has tags of thoughts without each other"
    if "/" in last.group():
        return "" if tags == [False, True] * (len(tags) // 2) else "ends a thought that the prompt has ended"
    return "" if tags[:1] == [True] and tags[1:] == [False, True] * (len(tags) // 2) else "does not end the thought"


def _judge_sentinels(tokenizer: PreTrainedTokenizerFast, other: Marked, encode: Encode) -> None:
    """With a sentinel in each field, each is trained in its own answer."""
    spans = _spans(other.conversation, inference_of(tokenizer, other.conversation), encode(other.conversation))
    for turn, span in spans.items():
        text = _decoded(tokenizer, list(span.example.input_ids[: span.begin]), span.ids)
        if lost := [value for value in other.sentinels[turn] if str(value).strip() not in text]:
            raise WrongError(f"turn {turn + 1}: of fields with sentinels, {lost[0]!r} is not in {text!r}")


def _squeezed(text: str) -> str:
    """A text without blanks: decoders of SentencePiece put some beside control tokens."""
    return re.sub(r"[\s▁]", "", text)


def _decoded(tokenizer: PreTrainedTokenizerFast, context: list[int], ids: list[int]) -> str:
    before = _decode(tokenizer, context)
    both = _decode(tokenizer, context + ids)
    return both[len(before) :] if both.startswith(before) else _decode(tokenizer, ids)


def _decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def mutations(example: Example) -> Iterator[tuple[str, Example]]:
    """WrongError sequences that are close to a right one."""
    ids, weights = list(example.input_ids), list(example.target_weights)
    trained = [n for n, weight in enumerate(weights) if weight > 0]
    first, last = trained[0], trained[-1]

    def with_weights(**changes: float) -> Example:
        own = list(weights)
        for place, weight in changes.items():
            own[int(place[1:])] = weight
        return Example(ids, own)

    yield "one token early", with_weights(**{f"_{first - 1}": weights[first]})
    yield "one token late", with_weights(**{f"_{first}": 0.0})
    yield "the stop is missing", with_weights(**{f"_{last}": 0.0})
    yield "another weight", with_weights(**{f"_{last}": weights[last] / 2})
    yield "another context", Example([ids[1], *ids[1:]], weights)
    yield "everything is trained", Example(ids, [1.0] * len(ids))
    yield "one token more", Example([*ids, ids[first]], [*weights, weights[last]])
    yield "one token lost", Example(ids[: last - 1] + ids[last:], weights[: last - 1] + weights[last:])
    yield "shifted", Example(ids, [*weights[1:], 0.0])
