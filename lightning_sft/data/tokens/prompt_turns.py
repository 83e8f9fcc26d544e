"""What is trained of a turn that no model generates: of the user, the system or a tool, where it has a weight.

Its context is what the next answer sees, ``apply_chat_template(messages before it, add_generation_prompt=True)``,
of the first answer behind it, or the end of the conversation, that the template renders. In there, trained are the text
of the turn as the template writes it, its header and what closes it. Not trained are the texts of other turns, what
stops an answer (it belongs to that, also where it begins the turn), the header of the next turn, what a template says
of its own, and tools.

Where a text stands in a render is found with sentinels around it: a render with them is taken only if it is the same
without them. What closes a turn is what the render that ends with it has in common with the context. Its header is what
stands between that and the text, or what is learnt of such turns elsewhere. Where neither is clear, the text is trained
without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_sft.data.tokens.answer_shape import is_written
from lightning_sft.data.tokens.markup import Markup
from lightning_sft.data.tokens.render import Trace
from lightning_sft.data.tokens.template import Template
from lightning_sft.data.tokens.text_marks import MARK, MARKS, with_marks
from lightning_sft.types import InputError, Message

_REMEDY = " Give it the weight 0, train answers alone (data.train_on=all), or give another data.chat_template."


@dataclass(frozen=True)
class _Context:
    """What the next answer sees, and where the texts of turns stand in it.

    Args:
        text: The prompt of the answer.
        end: Number of messages in it.
        places: Begin and end of the text of each turn; of an answer, the end of the last of its texts twice.
    """

    text: str
    end: int
    places: Mapping[int, tuple[int, int]]


class PromptTurns:
    """The turns of one conversation that no model generates.

    Args:
        template: The template.
        messages: The messages, with their control tokens marked.
        tools: Tools of the conversation.
        variables: Variables of the template.
        merged: Length of the system text that begins the first message; ``None`` where it has a turn of its own.
        stop_of: The token that stops the answer with some number, or nothing.
        trace: The render of the whole conversation, if there is one.
    """

    def __init__(
        self,
        template: Template,
        messages: Sequence[Message],
        tools: Any,
        variables: Mapping[str, Any],
        merged: int | None,
        stop_of: Callable[[int], str],
        trace: Trace | None,
    ) -> None:
        self.template, self.messages, self.tools, self.variables = template, messages, tools, variables
        self.stop_of, self.trace, self.markup = stop_of, trace, Markup(template.endings)
        self.shift = int(merged is not None)
        self.parts = {turn + self.shift: (turn, 0, len(m.get("content") or "")) for turn, m in enumerate(messages)}
        if merged is not None:
            self.parts |= {0: (0, 0, merged), 1: (0, merged + 2, self.parts[1][2])}
        self._contexts: dict[int, tuple[str, list[_Context]]] = {}

    def span(self, turn: int) -> tuple[str, int, int]:
        """A text that has a turn with all before it, and where what is trained of it begins and ends there.

        Raises:
            InputError: When the template refuses what the next answer sees, or does not write the turn, or a token
                reaches over the border.
        """
        context, role = self._context(turn), self._role(turn)
        text = context.text
        begin, end = context.places[turn]
        if not is_written(self._core(turn), text[begin:end]):
            raise InputError(_not_written(role))
        first, last = self._begin(turn, context), self._end(turn, context)
        for other, (own, after) in context.places.items():
            if other != turn and own < last and after > first:
                raise InputError(f"the chat template writes the {role} turn around another one." + _REMEDY)
        first, last = self._at_token(text, first, -1, role), self._at_token(text, last, 1, role)
        if first >= last:
            raise InputError(f"the {role} turn is empty, and the chat template writes nothing for it." + _REMEDY)
        if self.trace and self.trace.text.startswith(text[:last]):
            text = self.trace.text
        return text, first, last

    def _role(self, turn: int) -> str:
        return "system" if self.shift and not turn else str(self.messages[self.parts[turn][0]]["role"])

    def _core(self, turn: int) -> str:
        at, first, last = self.parts[turn]
        return (self.messages[at].get("content") or "")[first:last].strip()

    def _rendered(self, messages: Sequence[Message], generation: bool, tools: Any = ...) -> str:
        tools = self.tools if tools is ... else tools
        return self.template.rendered(messages, tools, generation, self.variables)[0]

    def _tried(self, messages: Sequence[Message], generation: bool = False, tools: Any = ...) -> str | None:
        try:
            return self._rendered(messages, generation, tools)
        except InputError:
            return None

    # where texts stand

    def _context(self, turn: int) -> _Context:
        """What the first answer after a turn sees that the template renders, with the place of the turn in it.

        Raises:
            InputError: When there is none, or the turn is not found there.
        """
        at, count, refusal = self.parts[turn][0], len(self.messages), None
        for end in range(at + 1, count + 1):
            if end < count and self.messages[end]["role"] != "assistant":
                continue
            try:
                if end not in self._contexts:
                    self._contexts[end] = self._prompt(end), []
            except InputError as error:
                refusal = refusal or error
                continue
            text, known = self._contexts[end]
            for context in known:
                if turn in context.places:
                    return context
            for places in self._found(text, end, turn):
                known.append(_Context(text, end, places))
                if turn in places:
                    return known[-1]
            raise InputError(_not_written(self._role(turn)))
        raise refusal or InputError(_not_written(self._role(turn)))

    def _prompt(self, end: int) -> str:
        if (trace := self.trace) and trace.begins[end]:
            return trace.text[: trace.begins[end]] + trace.prompt
        return self._rendered(self.messages[:end], generation=True)

    def _found(self, text: str, end: int, turn: int) -> Iterator[Mapping[int, tuple[int, int]]]:
        """The places of texts in a context, in ways that find fewer and fewer of them."""
        turns = [other for other, (at, _, _) in self.parts.items() if at < end]
        if self.trace and self.trace.begins[end]:
            yield {other: place for other, place in self._traced.items() if other in turns}
        others = [other for other in turns if self._role(other) != "assistant" and self._core(other)]
        for marked in (turns, others, [turn]):
            yield self._places(text, self._tried(self._marked(marked)[:end], True), {})
        core = self._core(turn)
        at, first, _ = self.parts[turn]
        content = str(self.messages[at].get("content") or "")
        for part in (2, 3, 5):  # a template may look at how a text begins and ends
            inside = len(core) // part
            place = content.find(core, first) + inside
            marked_one = {**self.messages[at], "content": f"{content[:place]}{MARK.format(turn, 'i')}{content[place:]}"}
            rendered = self._tried([*self.messages[:at], marked_one, *self.messages[at + 1 : end]], True)
            yield self._places(text, rendered, {turn: (inside, core)})

    @cached_property
    def _traced(self) -> Mapping[int, tuple[int, int]]:
        """The places of all texts in the render of the whole conversation."""
        assert self.trace is not None
        return self._places(self.trace.text + self.trace.end, self._tried(self._marked(list(self.parts))), {})

    def _marked(self, turns: Sequence[int]) -> list[Message]:
        messages = list(self.messages)
        for turn in sorted(turns, reverse=True):  # of two texts in a message, the later one first
            at, first, last = self.parts[turn]
            messages[at] = with_marks(messages[at], turn, first, last)
        return messages

    def _places(
        self, text: str, marked: str | None, inside: Mapping[int, tuple[int, str]]
    ) -> Mapping[int, tuple[int, int]]:
        """Where texts stand, of a render in which they are marked; none where that is not the same without marks."""
        if marked is None or MARKS.search(text) or MARKS.sub("", marked) != text:
            return {}
        found: dict[tuple[int, str], list[int]] = {}
        removed = 0
        for mark in MARKS.finditer(marked):
            found.setdefault((int(mark[1]), mark[2]), []).append(mark.start() - removed)
            removed += len(mark.group())
        places: dict[int, tuple[int, int]] = {}
        for turn in {turn for turn, _ in found}:
            begins, ends = found.get((turn, "b"), []), found.get((turn, "e"), [])
            if self._role(turn) == "assistant":
                places[turn] = (ends[-1], ends[-1])
            elif len(begins) == len(ends) == 1:
                places[turn] = (begins[0], ends[0])
            elif turn in inside and len(found[turn, "i"]) == 1:
                before, core = inside[turn]
                begin = found[turn, "i"][0] - before
                if text.startswith(core, begin):
                    places[turn] = (begin, begin + len(core))
        return places

    # what closes a turn

    def _end(self, turn: int, context: _Context) -> int:
        """Where a turn ends in its context, with what closes it, but for space."""
        end = context.places[turn][1]
        at, first, last = self.parts[turn]
        content = str(self.messages[at].get("content") or "")[first:last]
        after = content[len(content.rstrip()) :] if content.strip() else ""
        for place in dict.fromkeys([end, end + len(after) * context.text.startswith(after, end)]):
            if closing := self._closing(turn, context, place).rstrip():
                return place + len(closing)
        return end

    def _closing(self, turn: int, context: _Context, end: int) -> str:
        """What the template writes behind the text of a turn before it writes of another."""
        if self.shift and not turn:
            return ""
        others = (begin for other, (begin, _) in context.places.items() if other != turn and begin >= end)
        limit = min(others, default=len(context.text))
        closing, tail = context.text[end:limit], self._tail(turn, True)
        if (
            tail is None
        ):  # the template refuses what ends there: the next turn is closed in the same way, or it is not clear
            for other in sorted(context.places):
                if other > turn and self._role(other) not in ("assistant", "tool"):
                    closed = context.text[context.places[other][1] : self._end(other, context)]
                    return closed if closing.startswith(closed) else ""
            return ""
        tails = [tail]
        if self.tools:
            tails += [found for found in [self._tail(turn, False)] if found is not None]
        if tail.startswith(context.text[end:]):  # the template asks for an answer unasked, or never does
            tails += [found for found in [self._tail(turn, True, is_followed=True)] if found is not None]
        for other_tail in tails:
            closing = closing[: self.markup.shared(closing, other_tail)]
        opener = self.template.endings.match(self._header("user"))
        return self.markup.beginning_of(closing.partition(opener.group())[0] if opener else closing)

    def _tail(self, turn: int, with_tools: bool, is_followed: bool = False) -> str | None:
        """What a render has behind the text of its last turn; ``None`` where the template refuses it."""
        at, role = self.parts[turn][0], self._role(turn)
        before = self.messages[at - 1]["role"] if at else ""

        def learnt() -> str | None:
            own = MARK.format(turn, "e")
            marked = [with_marks(m, turn + 1, 0, len(m.get("content") or "")) for m in self.messages[:at]]
            messages: list[Message] = [*marked, {**self.messages[at], "content": f"{self._core(turn) or 'x'}{own}"}]
            if is_followed:
                messages.append({"role": "user", "content": MARK.format(turn, "i")})
            text = self._tried(messages, tools=self.tools if with_tools else None)
            if text is None or text.count(own) != 1:
                return None
            tail = text.partition(own)[2].partition(MARK.format(turn, "i"))[0]
            if is_followed:
                header = self._header("user")
                tail = tail.removesuffix(header) if header and tail.endswith(header) else ""
            return "" if MARKS.search(tail) else tail  # the template has moved it before others

        key = "tail", role, before, at > 1, with_tools and bool(self.tools), is_followed, str(self.variables)
        found: str | None = self.template.learnt(key, learnt)
        return found

    # what begins it

    def _begin(self, turn: int, context: _Context) -> int:
        """Where a turn begins in its context, with its header, if that is clear."""
        text, begin = context.text, context.places[turn][0]
        low, is_known = 0, False
        before = {other: after for other, (_, after) in context.places.items() if other != turn and after <= begin}
        if before:
            other = max(before, key=lambda own: (before[own], own))
            low, is_known = before[other], other == turn - 1
            if self._role(other) != "assistant":
                low += len(self._closing(other, context, low))
        if turn - self.shift > 0 and self._role(turn - 1) == "assistant":
            stop = self.stop_of(turn - 1 - self.shift)
            place = text.rfind(stop, low, begin) if stop else -1
            low, is_known = (place + len(stop), is_known) if place >= 0 else (low, False)
        at, first, last = self.parts[turn]
        content = str(self.messages[at].get("content") or "")[first:last]
        space = content[: len(content) - len(content.lstrip())] if content.strip() else ""
        for place in dict.fromkeys([begin, begin - len(space) * text.endswith(space, low, begin)]):
            for header in self._headers(self._role(turn)):
                if text.endswith(header, 0, place):
                    return self._behind_space(text, max(low, place - len(header)), place)
        if is_known and self.markup.is_header(text[low:begin]):
            return self._behind_space(text, low, begin)
        if not before and not at and self._role(turn) == "system":
            others = self._tried(self.messages[1 : context.end], True)
            low = 0 if others is None else self.markup.shared(text[:begin], others)
            if others is not None and not self.markup.has_words(text[low:begin]):
                return self._behind_space(text, low, begin)
        return begin

    def _headers(self, role: str) -> list[str]:
        """What begins a turn of a role, and what might: the header of the user's, with the name of the role or not."""
        if role not in ("user", "system"):
            return []
        user, own = self._header("user"), self._header(role)
        named = user
        for way in (str.lower, str.title, str.upper):
            named = named.replace(way("user"), way(role))
        return [header for header in dict.fromkeys([own, named, user]) if header]

    def _header(self, role: str) -> str:
        """What the template writes before a turn of a role that is not the first; empty where that is not clear."""
        last, texts = {"role": role, "content": MARK.format(1, "i")}, (MARK.format(1, "b"), MARK.format(1, "e"))
        asked, answered = (
            {"role": name, "content": text} for name, text in zip(("user", "assistant"), texts, strict=True)
        )

        def learnt() -> str:
            unclear = ""
            for turns in ([asked, answered], [{**asked, "content": texts[1]}]):
                for tools in (None, self.tools):
                    before, whole = (self._tried(own, tools=tools) for own in (turns, [*turns, last]))
                    if before is None or whole is None or any(t.count(texts[1]) != 1 for t in (before, whole)):
                        continue
                    tail, behind = (own.partition(texts[1])[2] for own in (before, whole))
                    gap, found, _ = behind.partition(MARK.format(1, "i"))
                    shared = self.markup.shared(tail.rstrip(), gap)
                    header = gap[shared:].lstrip()
                    if not found or MARKS.search(header) or not self.markup.is_header(header):
                        continue
                    if shared == len(tail.rstrip()):
                        return header
                    unclear = unclear or (header if shared else "")
            return unclear

        return str(self.template.learnt(("header", role, bool(self.tools), str(self.variables)), learnt))

    # borders

    @staticmethod
    def _behind_space(text: str, begin: int, end: int) -> int:
        own = text[begin:end]
        return begin + len(own) - len(own.lstrip())

    def _at_token(self, text: str, place: int, step: int, role: str) -> int:
        """A border of a turn, moved over space where a token has it.

        Raises:
            InputError: When a token reaches over it.
        """
        begin, end = self.template.segments.around(text, place)
        tried = [place]
        while 0 < tried[-1] < len(text) and text[min(tried[-1], tried[-1] + step)].isspace() and len(tried) < 16:
            tried.append(tried[-1] + step)
        if begin == place:
            return place
        whole, *beginnings = self.template.token_ids([text[begin:end], *(text[begin:own] for own in tried)])
        for own, ids in zip(tried, beginnings, strict=True):
            if whole[: len(ids)] == ids:
                return own
        side = "end" if step > 0 else "beginning"
        raise InputError(
            f"a token reaches over the {side} of the {role} turn, so it cannot be trained exactly." + _REMEDY
        )


def _not_written(role: str) -> str:
    return f"the chat template does not write the {role} turn as it is, once." + _REMEDY
