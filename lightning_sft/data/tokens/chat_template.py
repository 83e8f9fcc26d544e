"""A tokenizer's chat template, asked two things: the prompt of an answer at inference, and the answer's own text.

The answer of turn k is what the template adds to ``render(messages before k, add_generation_prompt=True)`` when turn k
is there, up to and with its stop token. Which fields of an answer a template writes, and where the answer stops, is
learnt from renders with sentinels (:mod:`lightning_sft.data.tokens.answer_shape`). Where the template writes something
else than that prompt before an answer of the past, or drops a field, the answer's own text is put behind the prompt:
raw continuation, which is what the model does at inference. Where the template has ``{% generation %}`` marks, they
have to say the same (:mod:`lightning_sft.data.tokens.generation_tags`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cached_property, lru_cache
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lightning_sft.data.tokens import control_tokens
from lightning_sft.data.tokens.answer_shape import (
    Ending,
    is_written,
    learn,
    num_shared,
    shape_of,
    values_in,
    with_sentinels,
)
from lightning_sft.data.tokens.generation_tags import Span, marked_end
from lightning_sft.data.tokens.render import FROZEN_DATE, Renderer, Trace
from lightning_sft.data.tokens.tokenize import Segments
from lightning_sft.types import Conversation, InputError, Message

Thoughts = Literal["keep", "split", "mask"]
"""Reasoning as it stands, taken out of ``<think>`` tags in an answer's text, or that and not trained."""

_OPENING = re.compile(r"(?:<(?P<tag>think\w*|thought\w*|reason\w*|seed:think)>|\[(?P<mark>THINK)\])(?P<space>\s*)\Z")
_INLINE = re.compile(r"(?s)\s*<(think|thinking)>(?P<thought>.*?)</\1>\s*(?P<text>.*)\Z")
_TAGS = re.compile(r"</?think\w*>")


@dataclass(frozen=True)
class TemplateConfig:
    """How conversations are rendered.

    Args:
        variables: Variables of the chat template, as ``{"enable_thinking": False}``; ``today`` is the date that it is
            told, as ``2026-01-31``.
        control_tokens: Treatment of control tokens in the texts of a conversation: tokenized as plain ``text``, a
            reason to ``refuse`` the row, or ``as_is``, as the tokens that they are.
        thoughts: Treatment of reasoning.
        stop_ids: Ids of the tokens that generation stops at, by the model's generation config.
    """

    variables: Mapping[str, Any] = field(default_factory=dict)
    control_tokens: control_tokens.Treatment = "text"
    thoughts: Thoughts = "keep"
    stop_ids: Sequence[int] = ()


@dataclass(frozen=True)
class Answer:
    """One trained turn as text.

    Args:
        text: A text that has the turn and all before it; turns may share one.
        begin: Where the turn begins, and its prompt ends.
        end: Where it ends, with its stop token.
        trained: Where what is trained of it begins.
    """

    text: str
    begin: int
    end: int
    trained: int

    @property
    def own(self) -> str:
        """The text of the turn."""
        return self.text[self.begin : self.end]


class ChatTemplate:
    r"""The chat template of a tokenizer.

    >>> from lightning_sft.demos import tiny_tokenizer
    >>> template = ChatTemplate.of(tiny_tokenizer())
    >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    >>> template.prompt_and_answer(turns, None)
    ('<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n', 'Yo<|im_end|>')
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TemplateConfig | None = None) -> None:
        self.tokenizer, self.config = tokenizer, config or TemplateConfig()
        source = tokenizer.chat_template
        self.sources: Mapping[str, str] = source if isinstance(source, dict) else {"default": str(source)}
        written = "".join(self.sources.values())
        self.special = control_tokens.pattern_of(tokenizer, written)
        self.added = control_tokens.any_added(tokenizer)
        known = [tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(list(self.config.stop_ids))]
        self.known_stops = frozenset(str(token) for token in known if token)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.segments = Segments(backend, tokenizer)
        self._endings: dict[Any, Ending] = {}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, config: TemplateConfig | None = None) -> ChatTemplate:
        """The template of a tokenizer; made once."""
        settings = json.dumps(asdict(config or TemplateConfig()), sort_keys=True, default=str)
        return _chat_template(tokenizer, json.dumps(tokenizer.chat_template), settings)

    @property
    def text(self) -> str:
        """All that decides on what is rendered: the sources with their date, and the settings."""
        texts = {name: self.renderer(source, {}).text for name, source in self.sources.items()}
        return texts["default"] if list(texts) == ["default"] else json.dumps(texts)

    def text_for(self, tools: Any, variables: Mapping[str, Any] | None = None) -> str:
        """The template for conversations with such tools, with its date, as ``apply_chat_template`` takes it."""
        return self._renderer_for(tools, variables or {}).text

    @cached_property
    def beginning(self) -> str:
        """What the tokenizer puts before a plain text: the beginning-of-sequence token, or nothing."""
        first = self.tokenizer("x")["input_ids"][0]
        return str(self.tokenizer.bos_token) if first == self.tokenizer.bos_token_id else ""

    @property
    def end(self) -> str:
        """What ends a plain text: the end-of-sequence token, where there is one."""
        return str(self.tokenizer.eos_token or "")

    def render(
        self, messages: Sequence[Message], tools: Any, generation: bool, variables: Mapping[str, Any] | None = None
    ) -> str:
        """The text of messages; with ``generation``, up to where the model is to answer.

        Raises:
            InputError: When the template refuses them.
        """
        return self.rendered(messages, tools, generation, {**self.config.variables, **(variables or {})})[0]

    def prompt_and_answer(self, messages: Sequence[Message], tools: Any) -> tuple[str, str]:
        """What stands before the last message at inference, and its text with its stop token.

        Raises:
            InputError: When the answer cannot be trained after that prompt.
        """
        answer = Rendering(self, Conversation(messages, tools)).answer(len(messages) - 1)
        return answer.text[: answer.begin], answer.own

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each rendered text, without any that the tokenizer would add; one call for all."""
        return self.segments.token_ids(texts)

    def renderer(self, source: str, variables: Mapping[str, Any]) -> Renderer:
        """What renders one of the sources, on the day that the variables name.

        Raises:
            InputError: When they name none.
        """
        today = str(variables.get("today") or FROZEN_DATE)
        try:
            day = date.fromisoformat(today)
        except ValueError as error:
            raise InputError(f"chat_template_kwargs: today={today!r} is no date such as 2026-01-31.") from error
        return _renderer(source, tuple(self.tokenizer.special_tokens_map.items()), day)

    def _renderer_for(self, tools: Any, variables: Mapping[str, Any]) -> Renderer:
        if isinstance(self.tokenizer.chat_template, dict):
            try:
                return self.renderer(self.tokenizer.get_chat_template(tools=tools), variables)
            except ValueError as error:
                raise InputError(f"{error} Give one with data.chat_template.") from error
        return self.renderer(self.sources["default"], variables)

    def rendered(
        self, messages: Sequence[Message], tools: Any, generation: bool, variables: Mapping[str, Any]
    ) -> tuple[str, list[Span]]:
        """The text of messages, and the spans of it that the template marks.

        Raises:
            InputError: When the template refuses them.
        """
        try:
            if not messages:
                raise InputError("there is no message before it.")
            given = list(map(_as_parts, messages)) if self._wants_parts else messages
            return self._renderer_for(tools, variables).render(given, tools, generation, variables)
        except (TimeoutError, InputError):
            raise
        except Exception as error:  # whatever a program of others raises
            if any(isinstance(_arguments(call), dict) for m in messages for call in m.get("tool_calls") or ()):
                return self.rendered([_with_text_arguments(m) for m in messages], tools, generation, variables)
            said = str(error) or type(error).__name__  # a MemoryError says nothing
            raise InputError(f"the chat template refuses the conversation: {said}") from error

    def trace(self, messages: Sequence[Message], tools: Any, variables: Mapping[str, Any]) -> Trace | None:
        """The render of a conversation in which those of its beginnings are found, where that is possible."""
        if self._wants_parts:
            return None
        return self._renderer_for(tools, variables).trace(messages, tools, variables)

    @property
    def stop_id(self) -> int | None:
        """Id of the token that ends an answer; ``None`` where the template has none."""
        return next(iter(self.stop_ids), None)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end answers: those of plain answers first, then those of tool calls."""
        asked = {"role": "user", "content": "x"}
        function = {"name": "f", "arguments": {"a": "b"}}
        call = {"id": "call00001", "type": "function", "function": function}
        tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
        ids: dict[int, None] = {}
        for tools, more in ((None, {}), ([tool], {"tool_calls": [call]})):
            answer = {"role": "assistant", "content": "" if more else "y", **more}
            try:
                rendering = Rendering(self, Conversation([asked, answer], tools))
                tokens = self.added.findall(rendering.ending(1).stop)
            except InputError:
                continue
            ids |= {int(self.tokenizer.convert_tokens_to_ids(token)): None for token in tokens[-1:]}  # type: ignore[arg-type]
        return tuple(ids)

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template writes a text only where it is given as a list of parts."""
        self.__dict__["_wants_parts"] = False  # while it is tried with strings
        turns = [{"role": "user", "content": "Xq1qX"}, {"role": "assistant", "content": "Xq2qX"}]
        found = []
        for messages in (turns, list(map(_as_parts, turns))):
            try:
                whole = self.rendered(messages, None, False, self.config.variables)[0]
            except InputError:
                whole = ""
            found.append("Xq1qX" in whole and "Xq2qX" in whole and "'text'" not in whole)
        return found == [False, True]

    @cached_property
    def merges_system(self) -> bool:
        """Whether a system turn has to be put into the first turn of the user, since the template refuses it."""
        turns = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
        return self._refuses(turns) and not self._refuses(turns[1:])

    def _refuses(self, messages: Sequence[Message]) -> bool:
        try:
            self.render(messages, None, generation=True)
        except InputError:
            return True
        return False

    @cached_property
    def always_prompts(self) -> bool:
        """Whether the template ends every conversation with the prompt of an answer, asked for or not."""
        turns = [{"role": "user", "content": "Xq1qX"}, {"role": "assistant", "content": "Xq2qX"}]
        try:
            texts = [self.render(turns[:1], None, generation) for generation in (True, False)]
            behind = texts[0].partition("Xq1qX")[2]
            return texts[0] == texts[1] and bool(behind.strip()) and self.render(turns, None, False).endswith(behind)
        except InputError:
            return False

    def ending(self, key: Any, make: Any) -> Ending:
        """How the template ends an answer of some shape in some place, learnt once."""
        if key not in self._endings:
            if len(self._endings) > 4096:
                self._endings.clear()
            self._endings[key] = make()
        return self._endings[key]


class Rendering:
    """One conversation, as a template renders it.

    Args:
        template: The template.
        conversation: The conversation.

    Raises:
        InputError: When a text of it has a control token, and those are refused.
    """

    def __init__(self, template: ChatTemplate, conversation: Conversation) -> None:
        self.template, config = template, template.config
        self.variables = {**config.variables, **conversation.template_kwargs}
        self.notes: set[str] = set()
        messages, self.tools = list(conversation.messages), conversation.tools
        if config.thoughts != "keep":
            messages = list(map(_with_thought_apart, messages))
        messages, self.tools, found = control_tokens.treated(
            messages, self.tools, template.special, config.control_tokens
        )
        if found:
            self.notes.add(f"control tokens in their texts are {found}")
        self.shift = 0
        if [message["role"] for message in messages[:2]] == ["system", "user"] and template.merges_system:
            text = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            messages, self.shift = [{**messages[1], "content": text}, *messages[2:]], 1
            self.notes.add("the chat template refuses system turns, so theirs begins the user's turn")
        self.messages = messages

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
        message, traced = self.messages[at], self._traced_turn(at)
        marks: list[Span] = []
        if traced is None:
            prompt, (whole, marks) = self._text(at, generation=True)[0], self._text(at + 1, generation=False)
            begin, text = len(prompt), whole if whole.startswith(prompt) else prompt
            rest = whole[begin:] if text is whole else None
        else:
            text, begin, rest = traced
        ending = self._ending(at, message)
        has_fields = any(shape_of(message))
        plain = ending if has_fields else self._ending(at, _PLAIN)
        problem = self._problem(message, text[max(0, begin - 32) : begin], rest, plain)
        if not has_fields:
            self.notes.add("an answer is empty, and its stop token alone is trained")
        if not problem:
            assert rest is not None
            own, thought = rest[: len(rest) - len(plain.tail)] + plain.stop, ending.between
            reasoning = (message.get("reasoning_content") or "").strip()
            trained = own.find(reasoning) + len(reasoning) + len(thought) if reasoning else 0
            if marks or self.template._renderer_for(self.tools, self.variables).has_marks:
                last = marked_end(text, begin, begin + len(own), marks, self.template.added)
                own = text[begin:last]
        else:
            if message.get("tool_calls"):
                raise InputError(problem)
            plain = plain if plain.stop else self._ending(at, _PLAIN)
            if not plain.stop:
                raise InputError(problem)
            own, trained = self._raw(text[:begin], message, plain.stop)
            self.notes.add("the answer is put behind the prompt by itself, since the chat template writes another")
        if self.template.config.thoughts != "mask":
            trained = 0
        if not text.startswith(own, begin):
            text = text[:begin] + own
        return Answer(text, begin, begin + len(own), begin + trained)

    def turn(self, turn: int) -> Answer:
        """A turn that is no assistant's, with all before it: what the template adds for it.

        Raises:
            InputError: When the template refuses it, or does not write its text.
        """
        at = turn - self.shift
        if at < 0:
            raise InputError("the system turn is merged into the user's, so it cannot be trained by itself.")
        trace = self._trace
        if trace and trace.begins[at + 1] and not trace.end and (trace.begins[at] or not at):
            text, begin, end = trace.text, trace.begins[at], trace.begins[at + 1]
        else:
            text = self._text(at + 1, generation=False)[0]
            before = self._text(at, generation=False)[0] if at else ""
            begin, end = num_shared(before, text), len(text)
        end = begin + len(text[begin:end].rstrip())
        if self.messages[at]["content"].strip() not in text[begin:end]:
            raise InputError(f"the chat template does not write the {self.messages[at]['role']} turn as it is.")
        return Answer(text, begin, end, begin)

    def unseen(self, prompt: str) -> None:
        """Note what of the conversation a prompt does not show, though it is there."""
        for tool in self.tools or ():
            if str(tool.get("function", tool).get("name", "")) not in prompt:
                self.notes.add("the chat template does not show the tools")
        for message in self.messages:
            if message["role"] == "system" and message["content"].strip() not in prompt:
                self.notes.add("the chat template does not show a system turn")

    @cached_property
    def _trace(self) -> Trace | None:
        if sum(message["role"] == "assistant" for message in self.messages) < 3:
            return None
        return self.template.trace(self.messages, self.tools, self.variables)

    def _traced_turn(self, at: int) -> tuple[str, int, str | None] | None:
        """The text of a turn with all before it, where it begins there, and what follows its prompt."""
        trace = self._trace
        if trace is None or not trace.begins[at] or not trace.begins[at + 1]:
            return None
        begin = trace.begins[at]
        if not trace.text.startswith(trace.prompt, begin):
            return trace.text[:begin] + trace.prompt, begin + len(trace.prompt), None
        begin += len(trace.prompt)
        return trace.text, begin, trace.text[begin : trace.begins[at + 1]] + trace.end

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
        whole = template.rendered([*before, answer.message], self.tools, False, self.variables)[0]
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
        return learn(answer, prompt, whole, onwards, template.added, template.known_stops, template.always_prompts)

    def _problem(self, message: Message, opening: str, rest: str | None, ending: Ending) -> str:
        """Why what the template writes of an answer cannot be trained; empty where it can."""
        if rest is None:
            return (
                "what the chat template puts before an answer is not what it puts before a generated one, so the "
                "answer would be trained in a context that the model never gets. Give a template where both agree: "
                "data.chat_template."
            )
        lost = _value_of(ending.lost[0], message) if ending.lost else ""
        place = _OPENING.search(opening)
        shown = (place.group() if place else "") + rest
        for text in ("" if lost else message.get("reasoning_content") or "", message.get("content") or ""):
            if any(part.strip() not in shown for part in ([text] if text.strip() in shown else _TAGS.split(text))):
                lost = lost or _short(text.strip())
        for call in () if lost else message.get("tool_calls") or ():
            for value in (call["function"]["name"], *values_in(_arguments(call))):
                if not is_written(value, rest):
                    lost = lost or _short(value)
        if lost:
            return (
                f"the chat template does not render {lost} of the answer as it is. Use a template that does "
                "(data.chat_template), or take it out of the row."
            )
        if not ending.stop:
            return _NO_STOP
        return "" if rest.endswith(ending.tail) else "the chat template ends the answer in its own way."

    def _raw(self, prompt: str, message: Message, stop: str) -> tuple[str, int]:
        """The text of an answer as the model would write it after a prompt, and where its text begins behind a thought.

        Raises:
            InputError: When it has a thought, and the prompt has ended it.
        """
        thought, text = (message.get(key) or "" for key in ("reasoning_content", "content"))
        opened = _OPENING.search(prompt)
        tag = opened and (opened["tag"] or opened["mark"])
        closing, space = (
            ("[/THINK]" if tag == "THINK" else f"</{tag}>", opened["space"]) if opened else ("</think>", "\n")
        )
        if opened and closing in "".join(self.template.sources.values()) + text:
            if not thought and closing in text:
                return text.removeprefix(opened.group().strip()).removeprefix(space) + stop, 0
            thought += f"{space}{closing}{2 * space}"
            if not message.get("reasoning_content"):
                self.notes.add("the prompt begins a thought, which is trained to be empty")
        elif thought:
            if prompt.rstrip().endswith("</think>"):
                raise InputError(
                    "the prompt of the chat template ends the thought before it begins, but the row has one. Set "
                    "data.chat_template_kwargs={enable_thinking: true}, or take the thought out of the row."
                )
            thought = f"<think>\n{thought}\n</think>\n\n"
        return thought + text + stop, len(thought)


_PLAIN: Message = {"role": "assistant", "content": "x"}
_NO_STOP = (
    "the chat template puts no stop token after the answer, so the model would never learn to stop. Add the "
    "end-of-turn token to the template: data.chat_template."
)


@lru_cache(maxsize=8)
def _chat_template(tokenizer: PreTrainedTokenizerBase, template: str, config: str) -> ChatTemplate:
    return ChatTemplate(tokenizer, TemplateConfig(**json.loads(config)))


@lru_cache(maxsize=64)
def _renderer(source: str, special_tokens: tuple[tuple[str, Any], ...], day: date) -> Renderer:
    return Renderer(source, dict(special_tokens), day)


def _with_thought_apart(message: Message) -> Message:
    """An answer whose text begins with a thought in tags, with the thought as its reasoning."""
    found = _INLINE.match(message["content"]) if message["role"] == "assistant" else None
    if found is None or message.get("reasoning_content"):
        return message
    return {**message, "content": found["text"], "reasoning_content": found["thought"].strip()}


def _as_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _arguments(call: Mapping[str, Any]) -> Any:
    return call["function"].get("arguments")


def _with_text_arguments(message: Message) -> Message:
    """The same with the arguments of its tool calls as JSON text, which some templates want."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    as_text = [
        {**call, "function": {**call["function"], "arguments": json.dumps(_arguments(call), ensure_ascii=False)}}
        for call in calls
    ]
    return {**message, "tool_calls": as_text}


def _value_of(field: str, message: Message) -> str:
    """What a message has in a field that answer_shape names; arguments are named."""
    found = {"the reasoning": message.get("reasoning_content"), "the text": message.get("content")}
    for number, call in enumerate(message.get("tool_calls") or (), 1):
        found[f"the name of tool call {number}"] = call["function"]["name"]
    return _short(found[field].strip()) if field in found else field


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
