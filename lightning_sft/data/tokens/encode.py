"""Conversations to token ids and target weights, built together: the mask is never searched for afterwards.

Parity is the rule. The context of an answer is what the model gets at inference, token for token:
``apply_chat_template(messages before it, add_generation_prompt=True)``. Answers share a sequence as long as each finds
its own context in it; where the template renders the past differently from a later turn, a new sequence begins. What
cannot be encoded this way is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.tokens.answer_shape import Answer
from lightning_sft.data.tokens.chat_template import ChatTemplate
from lightning_sft.data.tokens.render import in_time
from lightning_sft.data.tokens.rendering import Rendering
from lightning_sft.data.tokens.template_config import TemplateConfig
from lightning_sft.data.tokens.tokenize import Beginning, Ids
from lightning_sft.objective import target_weight
from lightning_sft.types import Conversation, Example, InputError, Normalize, Prompt

_BEFORE = ("\n", "x", ".")  # texts of which at least one does not merge with what follows
_AT_ONCE = 1 << 17  # characters of rendered text that are tokenized together


@dataclass
class Encoded:
    """What became of a conversation.

    Args:
        examples: Training sequences.
        refusal: Reason for a conversation without any.
        notes: Remarks on a conversation that is used.
    """

    examples: list[Example] = field(default_factory=list)
    refusal: InputError | None = None
    notes: set[str] = field(default_factory=set)


def encode(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    normalize: Normalize = "token",
    config: TemplateConfig | None = None,
) -> list[Example]:
    """The training sequences of a conversation: one, or more where the template rewrites earlier turns.

    Args:
        conversation: Every turn with a positive weight is a target; a lone ``text`` is one altogether.
        tokenizer: Tokenizer with a chat template.
        normalize: ``sequence`` divides an answer's weight by its number of tokens, ``sqrt`` by the root of it.
        config: How it is rendered.

    Raises:
        InputError: When there is no answer, parity is not possible, or the template renders for too long.

    >>> from lightning_sft.demos import tiny_tokenizer
    >>> tokenizer = tiny_tokenizer()
    >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    >>> [example] = encode(Conversation(turns, weights=[0, 1]), tokenizer)
    >>> tokenizer.decode([i for i, w in zip(example.input_ids, example.target_weights) if w > 0])
    'Yo<|im_end|>'
    """
    [result] = encode_many([conversation], tokenizer, normalize, config)
    if isinstance(result, InputError):
        raise result
    return result


def encode_many(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    normalize: Normalize = "token",
    config: TemplateConfig | None = None,
) -> list[list[Example] | InputError]:
    """The same for many at once; a refusal stands in the place of its sequences."""
    found = encode_all(conversations, tokenizer, normalize, config)
    return [each.refusal or [_in_lists(example) for example in each.examples] for each in found]


def encode_all(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    normalize: Normalize = "token",
    config: TemplateConfig | None = None,
) -> Iterator[Encoded]:
    """The same with what has to be said of each; ids and weights are arrays.

    Conversations are rendered and tokenized so many at a time that their text stays small. A thread tokenizes some
    while the next are rendered: the tokenizer works outside of Python's lock, on all cores.
    """
    template = ChatTemplate.of(tokenizer, config)
    thread = ThreadPoolExecutor(1)
    try:
        before: tuple[list[_Draft], Future[_Tokenized]] | None = None
        known: dict[str, Ids] = {}  # rows often begin as the rows before them
        for drafts in _some(conversations, template):
            tokenized = thread.submit(_tokenize, drafts, template, known)
            if before is not None:
                yield from _finished(*before, template, normalize)
            before = drafts, tokenized
        if before is not None:
            yield from _finished(*before, template, normalize)
    finally:  # perhaps by the garbage collector while a thread starts, which holds a lock that waiting would need
        thread.shutdown(wait=False, cancel_futures=True)


def encode_prompt(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, config: TemplateConfig | None = None
) -> Prompt:
    """The prompt at inference for the last answer of a conversation, and that answer as it is trained.

    Raises:
        InputError: When the template cannot render it.
    """
    template, messages = ChatTemplate.of(tokenizer, config), conversation.messages
    turn = len(messages) - (messages[-1]["role"] == "assistant")
    try:
        if turn and messages[turn - 1]["role"] == "text":
            raise InputError("a plain text has no prompt to answer. Give rows with prompts.")
        with in_time():
            rendering = Rendering(template, conversation)
            text, reference = rendering.prompt(turn), None
            if turn < len(messages):
                reference = _reference(rendering, turn, template)
        [ids] = template.token_ids([text])
    except (InputError, TimeoutError) as error:
        raise InputError(f"{conversation.provenance}: {error}") from error
    return Prompt(ids, reference, conversation.provenance)


def _reference(rendering: Rendering, turn: int, template: ChatTemplate) -> str:
    """What is trained of an answer as generated text is decoded; of one that cannot be trained, its text."""
    try:
        answer = rendering.answer(turn)
    except InputError:
        return str(rendering.messages[-1]["content"])
    [[context, both]] = template.segments.beginnings([(answer.text, [answer.begin, answer.end])])
    own = both.after(context)
    if own is None:
        try:
            own = _apart(context, both, answer, "", template)
        except InputError:
            return str(rendering.messages[-1]["content"])
    return str(template.tokenizer.decode(own.tolist(), skip_special_tokens=True))


@dataclass
class _Run:
    """Trained turns whose texts each begin with all of the one before: they may share a sequence.

    Args:
        text: Text of the last, which has all of them.
        turns: Number, weight and place in the text of each.
    """

    text: str
    turns: list[tuple[int, float, Answer]]


@dataclass
class _Draft:
    """A conversation as text: its trained turns, or why it cannot be used."""

    conversation: Conversation
    runs: list[_Run] = field(default_factory=list)
    refusal: InputError | None = None
    notes: set[str] = field(default_factory=set)


def _some(conversations: Iterable[Conversation], template: ChatTemplate) -> Iterator[list[_Draft]]:
    """Drafts, so many at a time that their text is about :data:`_AT_ONCE`."""
    left = iter(conversations)
    while drafts := _drafted(left, template):
        yield drafts


def _drafted(conversations: Iterator[Conversation], template: ChatTemplate) -> list[_Draft]:
    """Drafts of the next conversations; a template that takes too long for one stops everything.

    Raises:
        InputError: Then.
    """
    drafts: list[_Draft] = []
    size = 0
    with in_time() as start_time:
        for conversation in conversations:
            start_time()
            try:
                drafts.append(_draft(conversation, template))
            except TimeoutError as error:
                raise InputError(f"{conversation.provenance}: {error}.") from error
            size += sum(len(run.text) for run in drafts[-1].runs)
            if size > _AT_ONCE:
                break
    return drafts


def _draft(conversation: Conversation, template: ChatTemplate) -> _Draft:
    draft, where, messages = _Draft(conversation), conversation.provenance, conversation.messages
    weights = conversation.weights or [float(message["role"] in ("assistant", "text")) for message in messages]
    is_opened = False  # by the assistant
    try:
        rendering = Rendering(template, conversation)
        draft.notes = rendering.notes
        for turn, (message, weight) in enumerate(zip(messages, weights, strict=True)):
            where = f"{conversation.provenance}: turn {turn + 1}"
            if weight > 0:
                if message["role"] == "text":
                    _append(draft.runs, turn, weight, _of_text(message["content"], template))
                elif message["role"] != "assistant":
                    _append(draft.runs, turn, weight, rendering.turn(turn))
                elif turn:
                    _append(draft.runs, turn, weight, rendering.answer(turn))
                else:
                    is_opened = True
                    rendering.notes.add("the assistant opens the conversation: without a prompt, that turn is context")
        if draft.runs and messages[-1]["role"] != "text":
            end = draft.runs[-1].turns[-1][0] + 1
            rendering.unseen(draft.runs[-1].text, [turn for turn, _, _ in draft.runs[-1].turns])
            if left := ", ".join(dict.fromkeys(message["role"] for message in messages[end:])):
                rendering.notes.add(f"turns after the last that is trained are left out, they are of the role {left}")
    except InputError as error:
        draft.refusal = InputError(f"{where}: {error}")
    if not draft.runs and draft.refusal is None:
        if is_opened:
            why = "its only answer opens the conversation, so at inference there is no prompt for it. Add a user's turn"
        elif any(message["role"] in ("assistant", "text") for message in messages):
            why = "all its answers have the weight 0, so nothing would be trained. Remove the row, or give one a weight"
        else:
            why = "the row has no answer: no assistant turn"
        draft.refusal = InputError(f"{conversation.provenance}: {why}.")
    if draft.refusal:
        draft.runs = []
    return draft


def _of_text(text: str, template: ChatTemplate) -> Answer:
    if not text.strip():
        raise InputError("the text is empty. Remove the row.")
    begin, whole = len(template.beginning), template.beginning + text + template.end
    return Answer(whole, begin, len(whole), begin)


def _append(runs: list[_Run], turn: int, weight: float, answer: Answer) -> None:
    """Put a turn into the last run, if its text begins with all that is there, or else into a new one."""
    last = runs[-1].turns[-1][2] if runs else None
    is_longer = last is not None and (answer.text is last.text or answer.text.startswith(last.text[: last.end]))
    if last is not None and is_longer and last.end <= answer.begin:  # a template may write turns in another order
        runs[-1].text = answer.text
        runs[-1].turns.append((turn, weight, answer))
    else:
        runs.append(_Run(answer.text, [(turn, weight, answer)]))


_Tokenized = list[list[list[Beginning]]]
"""Of each run of each draft, its ids up to where each of its turns begins, is trained and ends."""


def _tokenize(drafts: Sequence[_Draft], template: ChatTemplate, known: dict[str, Ids] | None = None) -> _Tokenized:
    """Drafts tokenized with one call of the tokenizer.

    Raises:
        InputError: When the tokenizer makes a control token of plain text in one of them.
    """
    runs = [run for draft in drafts for run in draft.runs]
    places = [[p for _, _, answer in run.turns for p in (answer.begin, answer.trained, answer.end)] for run in runs]
    texts = [(run.text, own) for run, own in zip(runs, places, strict=True)]
    found = iter(template.segments.beginnings(texts, known))
    return [[next(found) for _ in draft.runs] for draft in drafts]


def _finished(
    drafts: Sequence[_Draft], tokenized: Future[_Tokenized], template: ChatTemplate, normalize: Normalize
) -> Iterator[Encoded]:
    """The sequences of drafts that have been tokenized."""
    try:
        ids: _Tokenized | None = tokenized.result()
    except InputError:  # of one row: which, is found one by one
        ids = None
    for number, draft in enumerate(drafts):
        encoded = Encoded([], draft.refusal, draft.notes)
        try:
            [own] = [ids[number]] if ids is not None else _tokenize([draft], template)
            encoded.examples = list(_assemble(draft, own, template, normalize))
        except InputError as error:
            encoded.refusal = error
        yield encoded


def _assemble(
    draft: _Draft, ids: Sequence[Sequence[Beginning]], template: ChatTemplate, normalize: Normalize
) -> Iterator[Example]:
    """Sequences from the ids of each run up to where each of its turns begins and ends."""
    provenance, answers_before = draft.conversation.provenance, 0
    for run, places in zip(draft.runs, ids, strict=True):
        sequence: _Sequence | None = None
        for number, (turn, weight, answer) in enumerate(run.turns):
            context, trained, both = places[3 * number : 3 * number + 3]
            own, apart = both.after(context), None
            masked: Ids | None = np.zeros(0, np.int32)
            if answer.trained > answer.begin:
                masked = None if own is None else trained.after(context)
            if own is None:  # the boundary merges: the prompt stays what it is at inference, the answer is apart
                own = apart = _apart(context, both, answer, f"{provenance}: turn {turn + 1}", template)
            num_masked = _num_masked(own, masked, answer, f"{provenance}: turn {turn + 1}", template)
            if sequence is not None and not sequence.continues(context):
                yield sequence.example(provenance)
                sequence = None
            if sequence is None:
                sequence = _Sequence(answers_before)
            value = target_weight(normalize, len(own) - num_masked, weight)
            end = both if apart is None else np.concatenate([context.ids, apart])
            sequence.append(context, num_masked, len(own), value, end)
            answers_before += 1
        if sequence is not None:
            yield sequence.example(provenance)


def _apart(context: Beginning, both: Beginning, answer: Answer, where: str, template: ChatTemplate) -> Ids:
    """Ids of an answer by itself.

    Some vocabularies put a blank before a text: it is tokenized behind another text there, whose ids are then left out.

    Raises:
        InputError: When they are not what follows on the prompt.
    """
    prompt, expected = context.ids.tolist(), template.tokenizer.decode(both.ids.tolist())
    for left in _behind(["", *_BEFORE], answer.own, template):
        if template.tokenizer.decode([*prompt, *left]) == expected:
            return np.array(left, np.int32)
    raise InputError(f"{where}: the tokenizer cannot tokenize the answer apart from the prompt before it.")


def _num_masked(own: Ids, masked: Ids | None, answer: Answer, where: str, template: ChatTemplate) -> int:
    """How many ids of an answer are those of its thought; by itself, that may be divided into others.

    Raises:
        InputError: When one of them is also one of what follows the thought.
    """
    if masked is not None and np.array_equal(own[: len(masked)], masked):
        return len(masked)
    for left in _behind(_BEFORE, answer.text[answer.trained : answer.end], template):
        if left and own[-len(left) :].tolist() == left:
            return len(own) - len(left)
    raise InputError(
        f"{where}: a token reaches over the end of the thought, so it cannot be masked exactly. Set "
        "data.thoughts=split to train it too."
    )


def _behind(before: Iterable[str], text: str, template: ChatTemplate) -> Iterator[list[int]]:
    """Ids of a text behind each of others with which it does not merge."""
    for other in before:
        alone, own = template.token_ids([other, other + text])
        if own[: len(alone)] == alone:
            yield own[len(alone) :]


class _Sequence:
    """A training sequence in the making: each turn that is added begins with all of the turns before."""

    def __init__(self, answers_before: int) -> None:
        self.answers_before = answers_before
        self._spans: list[tuple[int, int, float]] = []
        self._end: Beginning | Ids = np.zeros(0, np.int32)

    def continues(self, context: Beginning) -> bool:
        """Whether a context begins with all that is there, in ids; never after an answer that was tokenized apart."""
        return isinstance(self._end, Beginning) and context.after(self._end) is not None

    def append(self, context: Beginning, num_masked: int, num_own: int, weight: float, end: Beginning | Ids) -> None:
        """Add a turn: its context, how many of its tokens come first without weight, and all up to its end."""
        self._spans.append((context.length + num_masked, context.length + num_own, weight))
        self._end = end

    def example(self, provenance: str) -> Example:
        """All of it."""
        ids = self._end.ids if isinstance(self._end, Beginning) else self._end
        weights = np.zeros(len(ids))
        for begin, end, weight in self._spans:
            weights[begin:end] = weight
        weights[0] = 0.0  # the first token has no context: of a text, where nothing stands before it
        return Example(ids, weights, provenance, self.answers_before)


def _in_lists(example: Example) -> Example:
    ids, weights = np.asarray(example.input_ids).tolist(), np.asarray(example.target_weights).tolist()
    return replace(example, input_ids=ids, target_weights=weights)
