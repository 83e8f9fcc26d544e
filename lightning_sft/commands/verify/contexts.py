"""Check of every row's trained ids against the chat template of inference."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby, islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_sft.commands.verify.subject import Subject
from lightning_sft.commands.verify.verdict import Case, Outcome
from lightning_sft.data.rows.messages import Converter
from lightning_sft.data.rows.sources import leaves, parsed
from lightning_sft.data.tokens.chat_template import ChatTemplate
from lightning_sft.data.tokens.control_tokens import any_of, is_marked, marked_ids, unmarked
from lightning_sft.data.tokens.dataset import Split
from lightning_sft.data.tokens.rendering import Rendering
from lightning_sft.data.tokens.template import as_parts, with_text_arguments
from lightning_sft.data.tokens.template_config import configure
from lightning_sft.io.words import counted
from lightning_sft.model.pretrained import load_tokenizer
from lightning_sft.types import Conversation, Example, InputError, Message

_POWER = {"token": 0.0, "dataset": 0.0, "sequence": 1.0, "sqrt": 0.5}
"""Of w_t = 1 / targets ** power: its own table, since a check that shared that of the objective would prove nothing."""


def check_contexts(subject: Subject) -> Outcome:
    """Check that every trained token has its context of inference, and every answer is trained once.

    Rows are read again, and rendered by ``apply_chat_template(messages_before, add_generation_prompt=True)`` of a newly
    loaded tokenizer. In the training sequences, each answer must directly follow these ids, equal the template's
    rendering or else have all that the row says, end with its stop token, and have its weight; no other token may be
    trained. There is no tolerance. The date in a template is fixed (docs/contributing.md).
    """
    outcome = Outcome(
        "contexts: trained ids",
        "every trained token has the context of inference, and every answer is trained once, with its stop token",
        "rows whose trained ids or weights are not those of apply_chat_template",
    )
    module, data = subject.module, subject.data
    tokenizer = load_tokenizer(str(data.tokenizer_name), data.chat_template, module.new_tokens)
    configure(tokenizer, data.template)
    for name, split in data.splits.items():
        problems: list[str] = []
        chosen = _chosen(split, subject.rows, subject.seed)
        incomplete = {place.rpartition(" (")[0] for place in [*split.account.too_long, *split.account.cut]}
        count = 0
        for row, power, sequences in _rows(subject, name, split, chosen):
            count += 1
            longest = data.max_length if row.provenance in incomplete else None
            if isinstance(row, Example):
                found = (
                    []
                    if _are_its(sequences, row, power, longest is not None)
                    else ["its ids or weights are not those trained"]
                )
            else:
                found = problems_of(row, sequences, tokenizer, power, longest)
            problems += [f"{row.provenance}: {problem}" for problem in found]
        if count < len(chosen):
            lost, were = counted(len(chosen) - count, "row"), "was" if len(chosen) - count == 1 else "were"
            problems.append(f"{lost} of data.{name} {were} not found when it was read again")
        total = len(set(_keys(split)))
        number = counted(total, "row") if count == total else f"{count:,} of {counted(total, 'row')}"
        outcome.cases.append(
            Case(f"{name}: {number}", float(len({p.partition(": ")[0] for p in problems})), 0.0, problems)
        )
    return outcome


def problems_of(
    row: Conversation,
    sequences: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    power: float = 0.0,
    longest: int | None = None,
) -> list[str]:
    """Problems of the sequences of a row, by turn; empty if there are none.

    Args:
        row: Conversation with a weight for each message.
        sequences: Training sequences of the row.
        tokenizer: Tokenizer with the chat template of inference.
        power: Exponent p of the normalization, which divides the weight of an answer of n tokens by n^p.
        longest: Maximum number of tokens per sequence if the row was cut or lost a sequence; else ``None``.
    """
    problems: list[str] = []
    num_trained = sum(int(np.count_nonzero(np.asarray(s.target_weights) > 0)) for s in sequences)
    rendering = Rendering(ChatTemplate.of(tokenizer), row)
    weighted = list(zip(row.messages, row.weights, strict=True))
    with_prompts = any(weight > 0 and message["role"] not in ("assistant", "text") for message, weight in weighted)
    for turn, (message, weight) in enumerate(weighted):
        if not weight > 0 or (message["role"] == "assistant" and not turn):  # one that opens a conversation is context
            continue
        is_answer = message["role"] in ("assistant", "text")
        context, whole = _ids_at_inference(rendering, turn, is_answer)
        is_first = not is_answer and not context  # its first token, which has no context, is not trained
        context = context or whole[: int(is_first)]
        is_masked = rendering.template.config.thoughts == "mask" and "reasoning_content" in message
        found = [example for example in sequences if _begins_with(example, context, is_masked, with_prompts)]
        if not found:
            if longest is None:
                problems.append(f"turn {turn + 1}: no sequence trains it right behind the ids of inference")
            continue
        if message["role"] == "text" and longest is not None:  # split into pieces, see data/overflow
            num_trained -= sum(int(np.count_nonzero(np.asarray(s.target_weights) > 0)) for s in sequences)
            continue
        begin, weights = len(context), np.asarray(found[0].target_weights)
        if is_masked:
            begin += int(np.argmax(np.append(weights[begin:] > 0, True)))
        end = begin + int(np.argmax(np.append(weights[begin:] <= 0, True)))
        is_rendered = list(map(int, found[0].input_ids[: len(whole)])) == whole
        is_other = not is_answer and (end < len(whole) or not is_rendered)
        if not is_answer or (with_prompts and is_rendered):  # what follows may be trained, too
            begins_next = is_answer and whole[-1] not in tokenizer.added_tokens_decoder  # what stops it
            end = min(end, len(whole) + begins_next)
        num_trained -= (end - begin) * len(found)
        is_cut = longest is not None and end == len(weights) == longest
        wrong: list[str] = []
        if is_answer:
            own = rendering.messages[turn - rendering.shift]
            wrong = _wrong(list(map(int, found[0].input_ids[:end])), len(context), whole, own, tokenizer, is_cut)
        elif is_other and not is_cut:
            wrong.append("what is trained is not what the next answer is given of it")
        if len(found) > 1 and not with_prompts:
            wrong.append(f"it is trained {len(found)} times")
        is_whole = is_first or (message["role"] == "text" and whole[0] != tokenizer.bos_token_id)
        size = end - begin + is_whole
        if not is_cut and not np.allclose(weights[begin:end], weight / size**power, rtol=1e-9, atol=0):
            wrong.append(f"its weight is {weights[begin]:g}, expected {weight / size**power:g}")
        problems += [f"turn {turn + 1}: {problem}" for problem in wrong]
    if num_trained and not problems and not with_prompts:
        problems.append(f"{counted(num_trained, 'token', 'are')} trained that belong to no answer")
    return problems


def _begins_with(example: Example, context: list[int], is_masked: bool, with_prompts: bool) -> bool:
    """Whether a sequence begins with a context, and that what is trained behind it begins there."""
    weights, begin = np.asarray(example.target_weights), len(context)
    if list(map(int, example.input_ids[:begin])) != context:
        return False
    is_begun = with_prompts or begin < 2 or not weights[begin - 1] > 0
    return is_begun and bool((weights[begin:] if is_masked else weights[begin : begin + 1]).any())


def _wrong(
    ids: list[int], begin: int, whole: list[int], message: Message, tokenizer: PreTrainedTokenizerBase, is_cut: bool
) -> list[str]:
    """Problems of an answer, given the ids up to its end, its beginning, and the rendering that includes it."""
    text, rendered, own = (str(tokenizer.decode(part)) for part in (ids, whole, ids[begin:]))
    is_rendered = whole[: len(ids)] == ids or rendered.startswith(text)
    if not is_rendered and not (is_cut or all(part in text[-len(own) - 32 :] for part in _said(message))):
        return ["what is trained is neither what the template renders nor all that the row says"]
    if is_cut:
        return []
    control = {str(token) for token in tokenizer.added_tokens_decoder.values()}.union(tokenizer.all_special_tokens)
    last = tokenizer.convert_ids_to_tokens(ids[-1])
    if len(ids) == begin or last not in control:
        return [f"it ends with {last!r}, which is no stop token"]
    rest = any_of(control).sub("", rendered[len(text) :]) if is_rendered else ""
    return [f"{rest.strip()[:40]!r} of the answer is not trained"] if rest.strip() else []


def _said(message: Message) -> Iterator[str]:
    """The texts of an answer, without marks of control tokens."""
    for text in (message.get("reasoning_content") or "", *re.split(r"</?think\w*>", message.get("content") or "")):
        yield unmarked(text).strip()
    for call in message.get("tool_calls") or ():
        yield call["function"]["name"]


def _ids_at_inference(rendering: Rendering, turn: int, is_answer: bool) -> tuple[list[int], list[int]]:
    """Ids that the model receives at inference before a turn, and the ids including the turn."""
    tokenizer, at = rendering.template.tokenizer, turn - rendering.shift
    message = rendering.messages[at]
    if message["role"] == "text":
        ids = list(tokenizer(message["content"])["input_ids"])
        if ids[-1:] != [tokenizer.eos_token_id] and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        return ids[:1], ids  # a first token has no context, so it is never trained
    before = rendering.messages[:at]
    if is_answer:
        return _rendered(rendering, before, is_prompt=True) if before else [], _rendered(rendering, [*before, message])
    own = rendering.turn(turn)  # which of the ids that the next answer is given are those of the turn, and of its texts
    [[begin, end]] = rendering.template.segments.beginnings([(own.text, [own.begin, own.end])])
    count = len(rendering.messages)
    ends = [n for n in range(at + 1, count + 1) if n == count or rendering.messages[n]["role"] == "assistant"]
    prompts = (_rendered(rendering, rendering.messages[:n], is_prompt=True) for n in ends)
    prompt = next(filter(None, prompts), [])
    return prompt[: begin.length], prompt[: end.length]


def _rendered(rendering: Rendering, messages: Sequence[Message], is_prompt: bool = False) -> list[int]:
    """Ids of messages by ``apply_chat_template``, with marked control tokens as text."""
    tokenizer, tools = rendering.template.tokenizer, rendering.tools
    dated = rendering.template.text_for(tools, rendering.variables)
    settings: dict[str, Any] = {"tools": tools, "chat_template": dated, "add_generation_prompt": is_prompt}
    settings |= {"tokenize": False, **rendering.variables}
    text = ""
    for given in (messages, map(with_text_arguments, messages), map(as_parts, messages)):
        with suppress(Exception):  # templates want the arguments of tool calls as text, or contents as parts
            text = str(tokenizer.apply_chat_template(list(given), **settings))
        if text and messages[0]["content"].strip() in text:
            break
    if is_marked(text):
        return marked_ids(tokenizer, text)
    return list(map(int, tokenizer(text, add_special_tokens=False)["input_ids"]))


def _keys(split: Split) -> list[tuple[int, str]]:
    """Number of the data set, and row, of each sequence."""
    return [(int(part), e.provenance) for part, e in zip(split.parts, split.examples, strict=True)]


def _chosen(split: Split, most: int, seed: int) -> dict[tuple[int, str], list[Example]]:
    """Chosen rows with their sequences: those of the longest and shortest sequence, and random ones."""
    keys, lengths = _keys(split), split.examples.lengths
    drawn = np.random.default_rng(seed).permutation(len(keys)).tolist()
    order = (keys[i] for i in [int(lengths.argmax()), int(lengths.argmin()), *drawn])
    chosen: dict[tuple[int, str], list[Example]] = {key: [] for key in islice(dict.fromkeys(order), most)}
    for i, key in enumerate(keys):
        if key in chosen:
            chosen[key].append(split.examples[i])
    return chosen


def _rows(
    subject: Subject, name: str, split: Split, chosen: dict[tuple[int, str], list[Example]]
) -> Iterator[tuple[Conversation | Example, float, list[Example]]]:
    """The chosen rows, read again, with the exponent of their normalization and their sequences."""
    data = subject.data
    for number, part in enumerate(split.mixture.of_name.values()):
        convert = Converter(data.reading.of(part))
        for leaf in leaves(part.source):
            for raw, provenance in leaf():
                sequences = chosen.get((number, provenance))
                if sequences is None:
                    continue
                with suppress(InputError):  # a row that has changed counts as not found
                    row = convert.read(parsed(raw, provenance), provenance)
                    yield _weighted(row, part.weight), _POWER[subject.module.normalize], sequences


def _weighted(row: Conversation | Example, weight: float) -> Conversation | Example:
    if isinstance(row, Example):
        return replace(row, target_weights=[own * weight for own in row.target_weights])
    return replace(row, weights=[own * weight for own in row.weights])


def _are_its(sequences: Sequence[Example], row: Example, power: float, is_cut: bool) -> bool:
    """Whether a row of token ids is its sequence, or that a part of it where the row is cut."""
    ids, weights = list(row.input_ids), list(row.target_weights)
    for is_target, stretch in groupby(range(len(ids)), lambda place: row.target_weights[place] > 0):
        places = list(stretch) if is_target else []
        for place in places:
            weights[place] /= len(places) ** power
    first, *others = sequences
    size = len(first)
    for begin in (0, len(ids) - size) if is_cut else (0,):
        own = weights[begin : begin + size]
        if list(first.input_ids) == ids[begin : begin + size] and np.allclose(first.target_weights[1:], own[1:]):
            return is_cut or (not others and size == len(ids))
    return False
