"""A tokenizer's chat template: the text of messages, and what is learnt of the template once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property, lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_sft.data.rows.markup import inline_result
from lightning_sft.data.tokens import control_tokens, thoughts
from lightning_sft.data.tokens.answer_shape import Ending
from lightning_sft.data.tokens.generation_tags import Span
from lightning_sft.data.tokens.render import FROZEN_DATE, Renderer, Trace
from lightning_sft.data.tokens.template_config import TemplateConfig, configured
from lightning_sft.data.tokens.tokenize import Segments
from lightning_sft.types import InputError, Message

_RESULTS = {
    True: "results of tools are taken out of their <tool_response> tags, since the chat template writes those",
    False: "results of tools have <tool_response> tags, which stay, since the chat template writes none",
}


class Template:
    """The chat template of a tokenizer, or several by name.

    Args:
        tokenizer: The tokenizer.
        config: How conversations are rendered.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TemplateConfig | None = None) -> None:
        self.tokenizer, self.config = tokenizer, config or configured(tokenizer)
        source = tokenizer.chat_template
        self.sources: Mapping[str, str] = source if isinstance(source, dict) else {"default": str(source)}
        written = "".join(self.sources.values())
        self.special = control_tokens.pattern_of(tokenizer, written)
        self.endings = control_tokens.ending_pattern(tokenizer)
        known = [tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(list(self.config.stop_ids))]
        self.known_stops = frozenset(str(token) for token in known if token)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.segments = Segments(backend, tokenizer)
        self.wraps_results = "<tool_response>" in written
        self._special_tokens = tuple(tokenizer.special_tokens_map.items())
        self._learnt: dict[Any, Any] = {}

    @property
    def text(self) -> str:
        """Text of the template with its date, or of all that there are."""
        texts = {name: self.renderer(source, {}).text for name, source in self.sources.items()}
        return texts["default"] if list(texts) == ["default"] else json.dumps(texts)

    def text_for(self, tools: Any, variables: Mapping[str, Any] | None = None) -> str:
        """The template for conversations with such tools, with its date, as ``apply_chat_template`` takes it."""
        return self.renderer_for(tools, variables or {}).text

    def prepared(self, messages: Sequence[Message]) -> tuple[list[Message], set[str]]:
        """Messages as the template gets them, and what has to be said of them.

        Tags of results are those of templates such as Qwen's, which would write them a second time.
        """
        found, notes = list(messages), set[str]()
        if self.config.thoughts != "keep":
            found = list(map(thoughts.taken_apart, found))
            if any(map(thoughts.is_unread, found)):
                notes.add(thoughts.UNREAD)
        for number, message in enumerate(found):
            if message["role"] == "tool" and (result := inline_result(message["content"])) != message["content"]:
                if self.wraps_results:
                    found[number] = {**message, "content": result}
                notes.add(_RESULTS[self.wraps_results])
            elif message["role"] == "assistant" and "<tool_call>" in message["content"]:
                notes.add("answers have tool calls in their texts (<tool_call>), which are trained as they are")
            elif message["role"] == "user" and not message["content"].strip():
                notes.add("a turn of the user is empty")
        return found, notes

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

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each rendered text, without any that the tokenizer would add; one call for all."""
        return self.segments.token_ids(texts)

    def renderer(self, source: str, variables: Mapping[str, Any]) -> Renderer:
        """What renders one of the sources, on the day that the variables name.

        Raises:
            InputError: When they name none.
        """
        today = variables.get("today")
        try:
            day = date.fromisoformat(str(today)) if today else FROZEN_DATE
        except ValueError as error:
            raise InputError(f"chat_template_kwargs: today={str(today)!r} is no date such as 2026-01-31.") from error
        return _renderer(source, self._special_tokens, day)

    def renderer_for(self, tools: Any, variables: Mapping[str, Any]) -> Renderer:
        """What renders conversations with such tools: of several templates, the one that transformers takes.

        Raises:
            InputError: When it takes none.
        """
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
            given = list(map(as_parts, messages)) if self.wants_parts else messages
            return self.renderer_for(tools, variables).render(given, tools, generation, variables)
        except (TimeoutError, InputError):
            raise
        except Exception as error:  # whatever a program of others raises
            if any(isinstance(_arguments(call), dict) for m in messages for call in m.get("tool_calls") or ()):
                return self.rendered([with_text_arguments(m) for m in messages], tools, generation, variables)
            said = str(error) or type(error).__name__  # a MemoryError says nothing
            raise InputError(f"the chat template refuses the conversation: {said}") from error

    def trace(self, messages: Sequence[Message], tools: Any, variables: Mapping[str, Any]) -> Trace | None:
        """The render of a conversation in which those of its beginnings are found, where that is possible."""
        if self.wants_parts:
            return None
        return self.renderer_for(tools, variables).trace(messages, tools, variables)

    @cached_property
    def wants_parts(self) -> bool:
        """Whether the template writes a text only where it is given as a list of parts."""
        self.__dict__["wants_parts"] = False  # while it is tried with strings
        found = []
        for messages in (_EXCHANGE, list(map(as_parts, _EXCHANGE))):
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
    def opener(self) -> str:
        """The token that begins the turn of an answer; empty where that is not known."""
        try:
            prompt, asked = (self._tried(_EXCHANGE[:1], generation) for generation in (True, False))
        except InputError:
            return ""
        token = self.endings.search(prompt, len(asked)) if prompt.startswith(asked) else None
        return token.group() if token else ""

    def _tried(self, messages: Sequence[Message], generation: bool) -> str:
        """The text of messages without tools, or with one where the template wants some."""
        try:
            return self.render(messages, None, generation)
        except InputError:
            tool = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}
            return self.render(messages, [{"type": "function", "function": tool}], generation)

    @cached_property
    def always_prompts(self) -> bool:
        """Whether the template ends every conversation with the prompt of an answer, asked for or not."""
        try:
            texts = [self._tried(_EXCHANGE[:1], generation) for generation in (True, False)]
            behind, whole = texts[0].partition("Xq1qX")[2], self._tried(_EXCHANGE, False)
            return texts[0] == texts[1] and bool(behind.strip()) and whole.endswith(behind)
        except InputError:
            return False

    def stops_with(self, ending: Ending | None) -> frozenset[str]:
        """Tokens that generation stops at: the known ones, and the one that was learnt."""
        return self.known_stops.union(self.endings.findall(ending.stop)[-1:] if ending else [])

    def ending(self, key: Any, make: Any) -> Ending:
        """How the template ends an answer of some shape in some place, learnt once."""
        found: Ending = self.learnt(key, make)
        return found

    def learnt(self, key: Any, make: Any) -> Any:
        """What is learnt of the template once, by a key."""
        if key not in self._learnt:
            if len(self._learnt) > 4096:
                self._learnt.clear()
            self._learnt[key] = make()
        return self._learnt[key]


_EXCHANGE: list[Message] = [{"role": "user", "content": "Xq1qX"}, {"role": "assistant", "content": "Xq2qX"}]


@lru_cache(maxsize=64)
def _renderer(source: str, special_tokens: tuple[tuple[str, Any], ...], day: date) -> Renderer:
    return Renderer(source, dict(special_tokens), day)


def as_parts(message: Message) -> Message:
    """A message with its text as a list of parts, which some templates want."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _arguments(call: Mapping[str, Any]) -> Any:
    return call["function"].get("arguments")


def with_text_arguments(message: Message) -> Message:
    """A message with the arguments of its tool calls as JSON text, which some templates want."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    as_text = [
        {**call, "function": {**call["function"], "arguments": json.dumps(_arguments(call), ensure_ascii=False)}}
        for call in calls
    ]
    return {**message, "tool_calls": as_text}
