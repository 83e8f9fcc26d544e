"""Judges what is trained of turns that no model generates: of the user, the system and tools, where they have a weight.

Of one such turn that is trained alone, the ids up to its end are those that the next answer would be given; trained are
its own text, no character of another turn's, and of the template nothing but a header and what closes the turn. Of all
turns together, trained is what is trained of each alone, and no token twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from transformers import PreTrainedTokenizerFast

from lightning_sft.types import Conversation, Example, InputError
from tests.oracle.endings import ending_of
from tests.oracle.fields import Message, missing
from tests.oracle.inference import Inference, control_tokens
from tests.oracle.judge import WrongError, as_meant, inference_of, with_sentinels
from tests.oracle.kinds import NAMES, PARIS, TEXTS, WEATHER, answer, result, system, user
from tests.oracle.kinds import conversation as conversation_of
from tests.oracle.outcomes import Case, Outcome

MORE: dict[str, tuple[list[Message], bool]] = {
    "user last": ([*TEXTS["turns"], user("And then?")], False),
    "users": ([user("One."), user("Two."), answer("Yo"), user("Three."), user("Four."), answer("No.")], False),
    "empty user": ([user(""), answer("Yo"), user(""), answer("No.")], False),
    "empty result": ([user("Go."), answer("", PARIS), result(""), answer("Done.")], True),
    "quoted result": ([user("Go."), answer("", PARIS), result('{"t": "é\\n"}'), answer("Done.")], True),
    "system and tool": ([system("Be kind."), user("Go."), answer("", PARIS), result("sun"), answer("Done.")], True),
    "system, thoughts": ([system("Be kind."), *TEXTS["thoughts"]], False),
    "same texts": ([user("Yo"), answer("Yo"), user("Yo"), answer("Yo")], False),
    "looks like a tool's": (
        [user("Hi"), answer("Yo"), user("<tool_response>\nsunny\n</tool_response>"), answer("No.")],
        False,
    ),
}
KINDS = (*NAMES, *MORE)
FEW = ("turns", "system", "later system", "thoughts", "tools", "system, answer first", "space", "user last", "users")

_TAG = re.compile(r"</?[A-Za-z_][^<>\n]*>|\[/?[A-Z_]+\]")
_MOST_WORDS = 6


@dataclass(frozen=True)
class _Trained:
    """What is trained of one turn: the ids before it, and its own."""

    before: list[int]
    own: list[int]


def conversation(case: Case, kind: str) -> Conversation:
    if kind in MORE:
        turns, has_tools = MORE[kind]
        return Conversation(turns, tools=[WEATHER] if has_tools else None, provenance="f:1")
    return conversation_of(kind, case.tokenizer)


def outcomes(case: Case, kind: str) -> Iterator[tuple[str, Outcome]]:
    """What becomes of a kind, with each of its other turns trained alone, and with all turns."""
    given = conversation(case, kind)
    turns = [turn for turn, message in enumerate(given.messages) if message["role"] != "assistant"]
    for turn in turns:
        yield f"turn {turn + 1}", outcome(case, given, turn)
    yield "prompts", _outcome_of_all(case, given, turns)


def outcome(case: Case, given: Conversation, turn: int) -> Outcome:
    """What becomes of a conversation of which one turn has a weight."""
    alone = only(given, turn)
    try:
        found = case.encode(alone)
    except InputError as error:
        why = _impossible(inference_of(case.tokenizer, given), given, turn)
        return Outcome("refused" if why else "needless", why.upper() or "?", str(error))
    try:
        _judge(case, only(as_meant(case.tokenizer, given), turn), turn, found)
    except (WrongError, InputError) as error:
        return Outcome("wrong", "WRONG", str(error))
    return Outcome("exact", "=")


def only(given: Conversation, *turns: int) -> Conversation:
    return replace(given, weights=[float(turn in turns) for turn in range(len(given.messages))])


def _outcome_of_all(case: Case, given: Conversation, turns: Sequence[int]) -> Outcome:
    """Trained together, turns are what they are alone."""
    answers = [turn for turn, message in enumerate(given.messages) if turn and message["role"] == "assistant"]
    try:
        alone = [case.encode(only(given, *own)) for own in (*([turn] for turn in turns), answers) if own]
    except InputError as error:
        return Outcome("refused", "T", str(error))  # each refusal is judged by itself
    found = case.encode(only(given, *turns, *answers))
    expected, together = ([key for examples in some for key in _keys(examples)] for some in (alone, [found]))
    if sorted(expected) != sorted(together):
        return Outcome("wrong", "WRONG", "together, other tokens are trained than of each turn alone")
    if len(set(together)) != len(together):
        return Outcome("wrong", "WRONG", "a token is trained twice")
    return Outcome("exact", "=")


def _keys(examples: Sequence[Example]) -> Iterator[tuple[int, ...]]:
    """Each trained token with all that is before it."""
    for example in examples:
        ids = list(map(int, example.input_ids))
        for place, weight in enumerate(example.target_weights):
            if weight:
                yield (*ids[: place + 1],)


def _judge(case: Case, given: Conversation, turn: int, examples: Sequence[Example]) -> None:
    tokenizer, inference = case.tokenizer, inference_of(case.tokenizer, given)
    trained = _trained(examples)
    _judge_context(inference, given, turn, trained)
    if len(trained.before) == 1:  # the first token has no context
        trained = _Trained([], [*trained.before, *trained.own])
    text = _decoded(tokenizer, trained.own)
    own = inference.shown(_text(inference, turn))
    if lost := missing([own], text) if own.strip() else []:
        raise WrongError(f"{text!r} has no {lost[0]!r}")
    marked, sentinels = _marked(case, given)
    marked_inference = inference_of(tokenizer, marked)
    try:
        found = _trained(case.encode(marked))
    except InputError:
        found = None  # as where a text is no JSON any more
    if found is None or not own.strip():
        _judge_markup(case, inference, given, turn, text, own.strip())
        return
    _judge_context(marked_inference, marked, turn, found)
    text = _decoded(tokenizer, found.own if len(found.before) > 1 else [*found.before, *found.own])
    if text.count(sentinels[turn][0]) != 1:
        raise WrongError(f"with sentinels, {text!r} has {sentinels[turn][0]!r} not once")
    calls = [call for m in marked.messages for call in m.get("tool_calls") or ()]
    names = {call["function"]["name"] for call in calls if marked.messages[turn]["role"] == "tool"}  # its own, too
    for other, texts in sentinels.items():
        if other != turn and (foreign := [own for own in texts if own in text and own not in names]):
            raise WrongError(f"with sentinels, {text!r} has {foreign[0]!r} of turn {other + 1}")
    _judge_markup(case, marked_inference, marked, turn, text, sentinels[turn][0])


def _judge_context(inference: Inference, given: Conversation, turn: int, trained: _Trained) -> None:
    end = _next_answer(inference, given, turn)
    if end is None:
        raise WrongError("the template raises on all that it could be trained in")
    ids = [*trained.before, *trained.own]
    if not any(context[: len(ids)] == ids for context in inference.contexts(end)):
        raise WrongError("the ids up to the end of the turn are not those that the next answer is given")


def _judge_markup(case: Case, inference: Inference, given: Conversation, turn: int, text: str, own: str) -> None:
    """What stands around the own text is a header, and what closes the turn."""
    is_behind_answer = (
        turn > 1 and given.messages[turn - 1]["role"] == "assistant"
    )  # that does not open the conversation
    head, _, tail = text.partition(own) if own else (text, "", "")
    words = re.findall(r"\w+", _TAG.sub(" ", inference.added.sub(" ", f"{head} {tail}")))
    if len(words) > _MOST_WORDS:
        raise WrongError(f"{text!r} has {len(words)} words besides its own")
    if re.search(r"\w", _TAG.sub("", inference.added.sub("", tail))):
        raise WrongError(f"{text!r} continues with words behind its own text")
    closing = [token for token in inference.added.findall(tail) if token in control_tokens(case.tokenizer)]
    if own and (
        wrong := [token for token in inference.added.findall(head) if token in (case.tokenizer.eos_token, *closing)]
    ):
        raise WrongError(f"{text!r} has {wrong[0]} before its own text")
    if is_behind_answer and own:
        _judge_stop(inference, turn, head, [token for token in (case.tokenizer.eos_token, *case.stops) if token])
    if own and tail.strip():
        _judge_closing(inference, given, turn, tail, own)


def _judge_stop(inference: Inference, turn: int, head: str, known: Sequence[str]) -> None:
    """What stops the answer before is trained with the answer, also where it begins the turn."""
    try:
        stops = ending_of(inference, turn - 1, known).stops
    except Exception:
        return
    if wrong := [stop for stop in stops if stop in head]:
        raise WrongError(f"{head!r} has {wrong[0]}, which stops the answer before")


def _judge_closing(inference: Inference, given: Conversation, turn: int, tail: str, own: str) -> None:
    """What closes the turn is also there where the conversation ends with it, or nothing begins with it."""
    end = _next_answer(inference, given, turn)
    try:
        last = inference.text(turn + 1, generation=False)
    except Exception:
        last = ""
    if last.partition(own)[2].strip().startswith(tail.strip()) and last.count(own) == 1:
        others = [_text(inference, other).strip() for other in range(turn) if other - inference.merged >= 0]
        if not any(other and other in last.partition(own)[2] for other in others):
            return
    behind = inference.text(end or turn + 1, generation=True).partition(own)[2]
    later = [_text(inference, other).strip() for other in range(turn + 1, end or 0)]
    places = [behind.find(other) for other in later if other and other in behind]
    gap = behind[: min(places, default=len(behind))]
    begins = [token.start() for token in inference.added.finditer(gap)]
    if not begins or len(tail.rstrip()) > begins[-1]:
        raise WrongError(f"behind its text {tail!r} is trained, where the next turn begins in {gap[:80]!r}")


def _trained(examples: Sequence[Example]) -> _Trained:
    """What is trained in the only sequence.

    Raises:
        WrongError: When there are several, or something lies between.
    """
    if len(examples) != 1:
        raise WrongError(f"one turn is trained in {len(examples)} sequences")
    ids, weights = list(map(int, examples[0].input_ids)), list(examples[0].target_weights)
    places = [place for place, weight in enumerate(weights) if weight]
    if not places or places != list(range(places[0], places[-1] + 1)):
        raise WrongError(f"trained are the tokens {places}")
    return _Trained(ids[: places[0]], ids[places[0] : places[-1] + 1])


def _decoded(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of ids with added tokens as they are: decoders may write blanks in them."""
    added = tokenizer.added_tokens_decoder
    groups = groupby(ids, key=lambda token: token if token in added else None)
    return "".join(
        tokenizer.decode(list(own)) if token is None else str(added[token]) * len(list(own)) for token, own in groups
    )


def _next_answer(inference: Inference, given: Conversation, turn: int) -> int | None:
    """The first answer after a turn, or end of the conversation, whose prompt the template renders."""
    count = len(given.messages)
    for end in range(turn + 1, count + 1):
        if end == count or given.messages[end]["role"] == "assistant":
            try:
                inference.prompt(end)
            except Exception:
                continue
            return end
    return None


def _impossible(inference: Inference, given: Conversation, turn: int) -> str:
    """The letter of a reason why a turn cannot be trained: no prompt is rendered, or none has its text."""
    end = _next_answer(inference, given, turn)
    if end is None:
        return "t"
    own = _text(inference, turn).strip()
    if not own:
        return "d"
    # another text in the turn that stands nowhere else
    sentinel = "zqvOwnvqz"
    changed = inference.with_text(turn, sentinel) if turn >= inference.merged else None
    try:
        return "" if changed is None or changed.prompt(end).count(sentinel) == 1 else "d"
    except Exception:
        return "t"


def _text(inference: Inference, turn: int) -> str:
    """The text of a turn, as it would stand in a rendered text."""
    content = inference.given[turn].get("content") or ""
    return inference.with_marks(content if isinstance(content, str) else content[0]["text"])


def _marked(case: Case, given: Conversation) -> tuple[Conversation, dict[int, list[str]]]:
    """The same with a sentinel for the text of each turn, and in each field of answers."""
    made = with_sentinels(case.tokenizer, given)
    messages, sentinels = [], {turn: [str(own) for own in texts] for turn, texts in made.sentinels.items()}
    for turn, message in enumerate(made.conversation.messages):
        if message["role"] != "assistant" and message["content"].strip():
            sentinels[turn] = [f"zqvTurn{turn}vqz"]
            message = {**message, "content": message["content"].replace(message["content"].strip(), sentinels[turn][0])}
        messages.append(message)
    return replace(made.conversation, messages=messages), sentinels
