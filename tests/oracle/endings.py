"""Where an answer ends: at the first token that generation stops at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.oracle.fields import Leaf, Message, missing, spellings
from tests.oracle.inference import Inference, control_tokens

NEXT = "zqvNextvqz"


@dataclass(frozen=True)
class Ending:
    """What the template says of the end of an answer.

    Args:
        own: All that is to be trained, stop and all, where the template writes it behind the prompt; else ``None``.
        written: What the template writes of the answer, wherever that begins.
        head: What it writes before the first field.
        tail: What it writes after the last field, up to and with the stop.
        stops: Tokens that may end it.
        is_interrupted: Whether a stop stands before the end of what is said.
    """

    own: str | None
    written: str
    head: str
    tail: str
    stops: tuple[str, ...]
    is_interrupted: bool = False


def ending_of(inference: Inference, turn: int, known: Sequence[str]) -> Ending:
    """Render a turn, and one that follows it.

    Args:
        inference: The conversation.
        turn: An answer.
        known: EOS of the tokenizer, and of the model's generation config.

    Raises:
        Exception: Whatever the template raises on the conversation up to its answer.
    """
    prompt, whole = inference.prompt(turn), inference.text(turn + 1, generation=False)
    values = inference.fields(turn)
    behind = whole.startswith(prompt)
    shared = len(prompt) if behind else inference.shared(prompt, whole)
    written = whole[shared:]
    fields_end, head = _fields_end(values, written), _head(inference, turn, prompt, whole, shared)
    stops = _pattern(known)
    whole_answer = behind and not missing(values, written)
    if not values:  # its stop is that of any answer; a template may write nothing of an empty one
        plain = ending_of(inference.with_text(turn, "zqvTextvqz"), turn, known)
        return replace(plain, own=None, written=plain.written.replace("zqvTextvqz", ""))
    if found := stops.search(written, fields_end):
        is_interrupted = bool(stops.search(written[:fields_end]))
        own = written[: found.end()] if whole_answer and not is_interrupted else None
        return Ending(
            own, written, head, written[fields_end or found.start() : found.end()], (found.group(),), is_interrupted
        )
    following = _following(inference, turn)
    following = following[len(prompt) if following.startswith(prompt) else inference.shared(prompt, following) :]
    end = _fields_end(values, following)
    found = stops.search(following, end) or _pattern(control_tokens(inference.tokenizer)).search(following, end)
    if found is None:
        return Ending(None, written, head, "", ())
    is_same = whole_answer and following.startswith(written[:fields_end].rstrip())
    tail = following[end : found.end()]
    if not following.startswith(written[:fields_end].rstrip()):  # it writes the answer in another way there
        tail = written[fields_end or len(written) :].partition(found.group())[0] + found.group()
    is_interrupted = found.group() in following[:end]
    own = following[: found.end()] if is_same and not is_interrupted else None
    return Ending(own, written, head, tail, (found.group(),), is_interrupted)


def _following(inference: Inference, turn: int) -> str:
    """The conversation up to a turn, with one more of the user or of the tools, up to the text of that one."""
    at = turn - inference.merged
    messages = list(inference.messages[: at + 1])
    role = "tool" if messages[-1].get("tool_calls") else "user"
    content = [{"type": "text", "text": NEXT}] if "parts" in inference.forms else NEXT
    more: Message = {"role": role, "content": content}
    if role == "tool":
        call = messages[-1]["tool_calls"][-1]
        more = {**more, "name": call["function"]["name"], "tool_call_id": call.get("id", "0")}
    try:
        return inference.text([*messages, more], generation=False).partition(NEXT)[0]
    except Exception:
        return ""


def _fields_end(values: Sequence[Leaf], written: str) -> int:
    """Where the last field of an answer ends in what is written of it."""
    ends = [0]
    for value in values:  # in order, if that is how they are written
        places = [(written.find(way, ends[-1]), way) for way in spellings(value) if way]
        if found := sorted((place, -len(way)) for place, way in places if place >= 0):
            ends.append(found[0][0] - found[0][1])
        else:
            ends.append(max([written.rfind(way) + len(way) for _, way in places if way in written] or [0]))
    return max(ends)


def _head(inference: Inference, turn: int, prompt: str, whole: str, shared: int) -> str:
    """What is written before the first field, behind what the prompt ends with."""
    begin = shared + _fields_begin(inference.fields(turn), whole[shared:])
    if not any(text in prompt[shared:] for text in inference.texts_before(turn)):
        return whole[shared:begin]
    for token in inference.added.finditer(prompt):  # the past is written in another way
        place = whole.rfind(prompt[token.start() :], 0, begin)
        if place >= 0:
            return whole[place + len(prompt) - token.start() : begin]
    return ""


def _fields_begin(values: Sequence[Leaf], written: str) -> int:
    """Where the first field of an answer begins in what is written of it."""
    places = [written.find(way) for value in values for way in spellings(value) if way and way in written]
    return min(places, default=0)


def _pattern(tokens: Sequence[str] | set[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")
