"""One conversation as a template renders it: the prompt of each turn at inference, and what is trained after it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product

from lightning_sft.data.tokens import control_tokens, thoughts
from lightning_sft.data.tokens.answer_shape import (
    Answer,
    Ending,
    Stops,
    but_for_space,
    is_empty,
    is_written,
    learn,
    num_shared,
    shape_of,
    short,
    value_of,
    values_in,
    with_sentinels,
)
from lightning_sft.data.tokens.generation_tags import Span, marked_end
from lightning_sft.data.tokens.not_shown import not_shown
from lightning_sft.data.tokens.prompt_turns import PromptTurns
from lightning_sft.data.tokens.render import Trace
from lightning_sft.data.tokens.sandbox import forget_json
from lightning_sft.data.tokens.template import Template
from lightning_sft.types import Conversation, InputError, Message


class Rendering:
    """One conversation, as a template renders it.

    Args:
        template: The template.
        conversation: The conversation.

    Raises:
        InputError: When a text of it has a control token, and those are refused.
    """

    def __init__(self, template: Template, conversation: Conversation) -> None:
        self.template, config = template, template.config
        forget_json()
        self.variables = {**config.variables, **conversation.template_kwargs}
        messages, self.notes = template.prepared(conversation.messages)
        treatment = config.control_tokens
        if treatment == "text" and [m["role"] for m in messages[:1]] == ["text"]:  # it has no turns to forge
            treatment = "as_is"
        messages, self.tools, found = control_tokens.treated(messages, conversation.tools, template.special, treatment)
        if found:
            self.notes.add(f"control tokens in their texts are {found}")
        self.shift, self._merged = 0, None
        if [message["role"] for message in messages[:2]] == ["system", "user"] and template.merges_system:
            text = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            self._merged = len(messages[0]["content"])
            messages, self.shift = [{**messages[1], "content": text}, *messages[2:]], 1
            self.notes.add("the chat template refuses system turns, so theirs begins the user's turn")
        if template.wants_parts:
            self.notes.add("contents are given to the chat template as lists of parts, which it wants")
        self.messages = messages
        if any(map(self._doubles, {form for m in messages if (form := thoughts.form_of(m))})):
            self.messages = list(map(thoughts.taken_apart, messages))
            self.notes.add(thoughts.TAKEN_APART)

    def prompt(self, turn: int) -> str:
        """What stands before a turn at inference.

        Raises:
            InputError: When the template refuses what is before it.
        """
        return self._text(turn - self.shift, generation=True)[0]

    def ending(self, turn: int) -> Ending:
        """How the template ends the answer of a turn.

        Raises:
            InputError: When the template refuses it.
        """
        return self._ending(turn - self.shift, self.messages[turn - self.shift])

    def answer(self, turn: int) -> Answer:
        """The answer of a turn with all before it.

        Raises:
            InputError: When it cannot be trained in the context that inference gives it.
        """
        at = turn - self.shift
        message = self.messages[at]
        text, begin, own, problem = self._written(at, message)
        trained, reasoning = 0, (message.get("reasoning_content") or "").strip()
        if not problem and reasoning:
            trained = own.find(reasoning) + len(reasoning) + len(self._ending(at, message).between)
        elif problem:
            bare = {key: value for key, value in message.items() if key != "reasoning_content"}
            if reasoning and not is_empty(bare):  # most templates drop the reasoning and nothing else
                text, begin, own, problem = self._written(at, bare)
            if problem:
                own = self._raw(at, text[:begin], bare, problem)
            if reasoning:
                own, trained = self._with_thought(at, text[:begin], {**bare, "reasoning_content": reasoning}, own)
            self.notes.add(_THOUGHT_BY_ITSELF if reasoning else _BY_ITSELF)
        if thoughts.begin_of(own) is not None and thoughts.are_ended_by(text[:begin]):
            raise InputError(thoughts.ENDED)
        if is_empty(message):
            what = "empty but for blanks, which are left out," if message.get("content") else "empty,"
            self.notes.add(f"an answer is {what} and its stop token alone is trained")
        if not reasoning and (empty := thoughts.EMPTY_THOUGHT.match(own)):
            if own[empty.end() :].lstrip().startswith(message["content"].strip()):
                thoughts.check_after_empty_one(message["content"])
            self.notes.add(thoughts.UNTHINKING)
        if not text.startswith(own, begin):
            text = text[:begin] + own
        return Answer(text, begin, begin + len(own), begin + trained * (self.template.config.thoughts == "mask"))

    def turn(self, turn: int) -> Answer:
        """A turn that is no assistant's, with all before it as the next answer sees it.

        Raises:
            InputError: When the template refuses that, or does not write the turn.
        """
        text, begin, end = self._others.span(turn)
        return Answer(text, begin, end, begin)

    @cached_property
    def _others(self) -> PromptTurns:
        def stop_of(at: int) -> str:
            message = self.messages[at]
            try:
                stop = (not is_empty(message) and self._ending(at, message).stop) or self._ending(at, _PLAIN).stop
            except InputError:  # of the answer, or of one like it
                return ""
            return "".join(self.template.endings.findall(stop)[-1:])

        return PromptTurns(self.template, self.messages, self.tools, self.variables, self._merged, stop_of, self._trace)

    def unseen(self, text: str, turns: Sequence[int]) -> None:
        """Note what of the conversation up to the last of some turns a text that has them does not show."""
        own = [max(0, turn - self.shift) for turn in turns]  # a merged system turn is a part of the first
        self.notes |= not_shown(self.template, self.messages[: own[-1] + 1], self.tools, self.variables, text, own)

    @cached_property
    def _trace(self) -> Trace | None:
        if sum(message["role"] == "assistant" for message in self.messages) < 3:
            return None
        return self.template.trace(self.messages, self.tools, self.variables)

    def _traced_turn(self, at: int) -> tuple[str, int, str] | None:
        """The text of a turn with all before it, where it begins there, and what follows its prompt, if traced."""
        trace = self._trace
        if trace is None or not trace.begins[at] or not trace.begins[at + 1]:
            return None
        begin = trace.begins[at] + len(trace.prompt)
        if not trace.text.startswith(trace.prompt, trace.begins[at]):
            return None
        return trace.text, begin, trace.text[begin : trace.begins[at + 1]] + trace.end

    def _doubles(self, form: str) -> bool:
        """Whether an empty thought would be trained before one in the text of an answer."""

        def learnt() -> bool:
            message = {"role": "assistant", "content": form.format("Xqthoughtq", "Xqtextq")}
            given = Conversation([{"role": "user", "content": "x"}, _PLAIN], template_kwargs=self.variables)
            made = Rendering(self.template, given)
            made.messages[-1] = message
            try:
                text, begin, own, problem = made._written(1, message)
                own = made._raw(1, text[:begin], message, problem) if problem else own
            except InputError:
                return False
            empty = thoughts.EMPTY_THOUGHT.match(own)
            return empty is not None and own[empty.end() :].lstrip().startswith(message["content"])

        shown = json.dumps(self.variables, sort_keys=True, default=str)
        return bool(self.template.learnt(("doubled", form, shown), learnt))

    def _whole(self, at: int, message: Message) -> tuple[str, list[Span]]:
        """The conversation up to and with an answer, and what of it is marked."""
        return self.template.rendered([*self.messages[:at], message], self.tools, False, self.variables)

    def _text(self, end: int, generation: bool) -> tuple[str, list[Span]]:
        return self.template.rendered(self.messages[:end], self.tools, generation, self.variables)

    def _ending(self, at: int, message: Message) -> Ending:
        roles = tuple(m["role"] for m in self.messages[max(0, at - 2) : at])
        shown = json.dumps(self.variables, sort_keys=True, default=str) if self.variables else ""
        key = shape_of(message), roles, at > 2, bool(self.tools), shown
        return self.template.ending(key, lambda: self._learn(at, message))

    def _learn(self, at: int, message: Message) -> Ending:
        template, before = self.template, self.messages[:at]
        answer = with_sentinels(message)
        prompt = self._text(at, generation=True)[0]
        whole = self._whole(at, answer.message)[0]
        calls = answer.message.get("tool_calls") or ()
        following: list[Message] = [{"role": "user", "content": "XqnextqX"}]
        if calls:
            following = [
                {"role": "tool", "name": call["function"]["name"], "tool_call_id": call.get("id", "call00001")}
                | {"content": "XqnextqX"}
                for call in calls
            ]
        try:
            onwards = template.rendered([*before, answer.message, *following], self.tools, False, self.variables)[0]
            onwards = onwards.partition("XqnextqX")[0]
        except InputError:
            onwards = None
        plain = None if message is _PLAIN else self._ending(at, _PLAIN)
        known = template.stops_with(plain)
        stops = Stops(template.endings, known, template.opener, template.always_prompts, plain)
        found = learn(answer, prompt, whole, onwards, stops)
        is_past = any(text and text in found.before for text in (m.get("content", "").strip() for m in before))
        if found.header and is_past and prompt.count(found.header) != whole.count(found.header):  # of an earlier answer
            return replace(found, header="", before="")
        return found

    def _written(self, at: int, message: Message) -> tuple[str, int, str, str]:
        """What the template writes of an answer: a text with all before it, where it begins, itself, and a problem."""
        if is_empty(message):  # an empty one is a plain one without its text
            self._whole(at, message)  # the template may refuse it
            text, begin, own, problem = self._written(at, _PLAIN)
            stop = own[own.rfind(self._ending(at, _PLAIN).stop.strip()) :]
            place = own.rfind("x", 0, len(own) - len(stop))
            own, opened = own[:place] + own[place + 1 :], thoughts.OPENING.search(text[:begin])
            if opened and (end := thoughts.closing(opened)).strip() not in own:
                own = end + own
            return text, begin, own, problem
        ending = self._ending(at, message)
        marks: list[Span] | None = None
        rest: str | None
        if (traced := self._traced_turn(at)) and message is self.messages[at]:
            text, begin, rest = traced
        else:
            prompt, (whole, spans) = self._text(at, generation=True)[0], self._whole(at, message)
            begin, text = len(prompt), whole if whole.startswith(prompt) else prompt
            rest = whole[begin:] if text is whole else self._joined(prompt, whole, ending)
            if text is whole and self.template.renderer_for(self.tools, self.variables).has_marks:
                marks = spans
        problem = self._problem(message, text[max(0, begin - 32) : begin], rest, ending)
        if problem or rest is None:
            return text, begin, "", problem
        own = self._stopped(rest, ending)
        if marks is not None:
            if any(first < begin < last for first, last in marks):
                self.notes.add("the {% generation %} marks begin in the prompt, of which nothing is trained")
            own = text[begin : marked_end(text, begin, begin + len(own), marks, self.template.endings)]
        return text, begin, own, ""

    def _problem(self, message: Message, opening: str, rest: str | None, ending: Ending) -> str:
        """Why what the template writes of an answer cannot be trained; empty where it can."""
        if rest is None:
            return (
                "what the chat template puts before an answer is not what it puts before a generated one, so the "
                "answer would be trained in a context that the model never gets. Give a template where both agree: "
                "data.chat_template."
            )
        lost = value_of(ending.lost[0], message) if ending.lost else ""
        place = thoughts.OPENING.search(opening)
        shown = (place.group() if place else "") + rest
        for text in ("" if lost else message.get("reasoning_content") or "", message.get("content") or ""):
            if any(
                part.strip() not in shown for part in ([text] if text.strip() in shown else thoughts.TAGS.split(text))
            ):
                lost = lost or short(text.strip())
        for call in () if lost else message.get("tool_calls") or ():
            name, values = call["function"]["name"], values_in(call["function"].get("arguments"))
            if not is_written(name, rest):
                lost = lost or f"the tool call {short(name)}"
            lost = lost or next((short(value) for value in values if not is_written(value, rest)), "")
        if lost:
            return (
                f"the chat template does not render {lost} of the answer as it is. Use a template that does "
                "(data.chat_template), or take it out of the row."
            )
        if not ending.stop:
            return _NO_STOP
        own = self._stopped(rest, ending)
        if not own:
            return "the chat template ends the answer in its own way."
        if self.template.config.control_tokens == "as_is":
            return ""
        written = control_tokens.without_marked(own)
        if any(stop in written[: -len(stop)] for stop in self.template.stops_with(ending)):
            return "the chat template writes a stop token within the answer: generation would end there."
        return ""

    def _stopped(self, rest: str, ending: Ending) -> str:
        """What follows the prompt up to and with the stop token; empty where it ends in another way than was learnt."""
        if rest.endswith(ending.tail):
            return rest[: len(rest) - len(ending.tail)] + ending.stop
        token = None if ending.stops_at_next else self.template.endings.search(ending.stop)
        rest, closing = rest.rstrip(), ending.tail[token.start() :].rstrip() if token else ""
        if not token or not rest.endswith(closing):
            return ""
        return rest[: len(rest) - len(closing)] + ending.stop[token.start() :]  # a field may be quoted in another way

    def _joined(self, prompt: str, whole: str, ending: Ending) -> str | None:
        """What follows a prompt in a render that parts from it: in space or a thought at its end, or far before."""
        shared = num_shared(prompt, whole)
        for pattern, text in product((self.template.endings, thoughts.TAGS), (prompt, whole)):
            inside = (found for found in pattern.finditer(text, max(0, shared - 64), shared + 64))
            shared = min([shared, *(found.start() for found in inside if found.start() < shared < found.end())])
        left, rest = prompt[shared:], whole[shared:]
        tags = thoughts.TAGS.findall(left)
        is_within = bool(tags) and tags[0].startswith("</")  # the prompt ends a thought that the render continues
        endings, own = self.template.endings, control_tokens.without_marked(rest.removesuffix(ending.tail))
        is_repeated = set(endings.findall(left)) & set(endings.findall(own))
        is_other = not thoughts.THOUGHT_WORD.fullmatch(thoughts.TAGS.sub("", endings.sub("", left)))
        if is_within or is_repeated or is_other:
            here = whole.rfind(ending.header + ending.before) if ending.header else -1
            return whole[here + len(ending.header) :] if here >= 0 else None
        self.notes.add(_BY_ITSELF)
        closing = thoughts.closing(opened) if (opened := thoughts.OPENING.search(left)) else ""
        if tags and not closing:  # of a thought that the prompt has ended, the render may have the end
            rest = rest.removeprefix(tags[-1])
        return rest if rest.lstrip().startswith(closing.strip()) else closing + rest

    def _raw(self, at: int, prompt: str, message: Message, problem: str) -> str:
        """The text of an answer as the model would write it after a prompt.

        Raises:
            InputError: When it has tool calls, each template's in a markup of its own, or nothing stops it, or it has a
                thought and the prompt has ended that.
        """
        plain = self._ending(at, _PLAIN)
        stop = self._ending(at, _PLAIN if is_empty(message) else message).stop or plain.stop
        has_header = True
        if at and self.messages[at - 1]["role"] == "assistant":  # two answers in a row
            has_header = prompt.rfind(self.template.opener) >= prompt.rfind(self.messages[at - 1]["content"].strip())
        if message.get("tool_calls") and (own := self._call(at, prompt, message)):
            return own
        if message.get("tool_calls") or not stop or not has_header:
            raise InputError(problem)
        text, opened = message.get("content") or "", thoughts.OPENING.search(prompt)
        begin = thoughts.begin_of(text)
        if begin is not None and thoughts.are_ended_by(prompt):
            raise InputError(thoughts.ENDED)
        if opened and begin is not None:  # it begins with the prompt's end
            return text[begin:].removeprefix(opened["space"]) + stop
        return (self._header(plain) or (thoughts.closing(opened) if opened else "")) + text + stop

    def _call(self, at: int, prompt: str, message: Message) -> str:
        """An answer with tool calls as the template writes it behind a prompt that has other space; else nothing."""
        whole, ending = self._whole(at, message)[0], self._ending(at, message)
        shared = num_shared(prompt, whole)
        rest = but_for_space(prompt[shared:], whole[shared:])
        return "" if rest is None or self._problem(message, prompt, rest, ending) else self._stopped(rest, ending)

    def _header(self, ending: Ending) -> str:
        """What the template writes between the prompt and an answer, where that has control tokens."""
        tokens = set(self.template.endings.findall(ending.before))
        return ending.before if tokens and not tokens & self.template.stops_with(ending) else ""

    def _with_thought(self, at: int, prompt: str, message: Message, own: str) -> tuple[str, int]:
        """An answer with a thought in it that the template drops, and where what follows the thought begins.

        Raises:
            InputError: When the prompt has ended the thought.
        """
        thought, has_text = message["reasoning_content"], bool((message.get("content") or "").strip())
        if opened := thoughts.OPENING.search(prompt):
            closing = thoughts.closing(opened)
            own = own if own.startswith(closing) else closing + own
            return thought + own, len(thought) + len(closing)
        if thoughts.are_ended_by(prompt):
            raise InputError(thoughts.ENDED)
        header = self._header(self._ending(at, _PLAIN)) if has_text else ""
        header = header if own.startswith(header) else ""
        begin, end = f"{header}<think>\n", "\n</think>\n\n"
        usual = self._ending(at, _THOUGHTFUL)  # as the template writes thoughts elsewhere
        if not usual.lost and usual.between and not message.get("tool_calls"):
            begin, end = usual.before, usual.between
        own = own.removeprefix(header)
        if empty := thoughts.EMPTY_THOUGHT.match(own):
            own = own[empty.end() :].lstrip()
        return begin + thought + end + own, len(begin) + len(thought) + len(end)


_PLAIN: Message = {"role": "assistant", "content": "x"}
_THOUGHTFUL: Message = {**_PLAIN, "reasoning_content": "x"}
_BY_ITSELF = "the answer is put behind the prompt by itself, since the chat template writes the past in another way"
_THOUGHT_BY_ITSELF = _BY_ITSELF.replace("the answer is put", "the answer with its reasoning is put")
_NO_STOP = (
    "the chat template puts no stop token after the answer, so the model would never learn to stop. Add the "
    "end-of-turn token to the template: data.chat_template."
)
