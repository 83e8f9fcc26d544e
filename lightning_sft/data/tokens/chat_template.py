"""A tokenizer's chat template, asked two things: the prompt of an answer at inference, and the answer's own text.

The answer of turn k is what the template adds to ``render(messages before k, add_generation_prompt=True)`` when turn k
is there, up to and with its stop token. Which token stops an answer is learnt from the template on a plain exchange.
Where the template has ``{% generation %}`` marks, they have to say the same
(:mod:`lightning_sft.data.tokens.generation_tags`).
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from functools import cached_property, lru_cache
from string import ascii_letters
from threading import current_thread, main_thread
from typing import Any, cast

from jinja2 import nodes
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from lightning_sft.data.tokens.generation_tags import Span, has_marks, marked_end, render_with_marks
from lightning_sft.data.tokens.tokenize import Segments
from lightning_sft.types import InputError, Message

FROZEN_DATE = date(2024, 7, 26)
"""Date for templates that print today's date: training must not depend on the day it runs."""

MAX_SECONDS = 60.0
"""Of rendering one conversation; a template is a program that somebody else has written."""


@contextmanager
def in_time() -> Iterator[None]:
    """Stop what renders a conversation after :data:`MAX_SECONDS`, where the system has timers for it.

    It needs the main thread and a system with ``SIGALRM``, and leaves a timer of somebody else's alone.

    Raises:
        TimeoutError: When it has not ended by then. It is no refusal of a row: those must not depend on a clock.
    """
    has_timers = hasattr(signal, "setitimer") and current_thread() is main_thread()
    if not has_timers or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return
    before = signal.signal(signal.SIGALRM, _too_late)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class ChatTemplate:
    r"""The chat template of a tokenizer.

    >>> from lightning_sft.demos import tiny_tokenizer
    >>> template = ChatTemplate.of(tiny_tokenizer())
    >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    >>> template.prompt_and_answer(turns, None)
    ('<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n', 'Yo<|im_end|>')
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.text = _frozen(str(tokenizer.chat_template))
        self.has_marks = has_marks(self.text)
        longest_first = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        self._segments = None if backend is None else Segments(backend)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """The template of a tokenizer; made once."""
        return _chat_template(tokenizer, str(tokenizer.chat_template))

    @cached_property
    def beginning(self) -> str:
        """What the tokenizer puts before a plain text: the beginning-of-sequence token, or nothing."""
        first = self.tokenizer("x")["input_ids"][0]
        return str(self.tokenizer.bos_token) if first == self.tokenizer.bos_token_id else ""

    @property
    def end(self) -> str:
        """What ends a plain text: the end-of-sequence token, where there is one."""
        return str(self.tokenizer.eos_token or "")

    def render(self, messages: Sequence[Message], tools: Any, generation: bool) -> str:
        """The text of messages; with ``generation``, up to where the model is to answer.

        Raises:
            InputError: When the template refuses them.
        """
        return self._render(messages, tools, generation)[0]

    def prompt_and_answer(self, messages: Sequence[Message], tools: Any) -> tuple[str, str]:
        """What stands before the last message at inference, and its text with its stop token.

        Raises:
            InputError: When the template renders the two inconsistently, loses text, puts no stop token, or marks
                another text.
        """
        prompt = self.render(messages[:-1], tools, generation=True)
        whole, marks = self._render(messages, tools, generation=False)
        if not whole.startswith(prompt):
            raise InputError(
                "what the chat template puts before an answer is not what it puts before a generated one, so the "
                "answer would be trained in a context that the model never gets. Give a template where both agree: "
                "data.chat_template."
            )
        answer = whole[len(prompt) :]
        for text in _payload(messages[-1]):
            if text not in answer and json.dumps(text)[1:-1] not in answer:
                raise InputError(
                    f"the chat template does not render {_short(text)} of the answer as it is. Use a template that "
                    "does (data.chat_template), or take it out of the row."
                )
        end = len(prompt) + self._end(answer)
        if self.has_marks:
            end = marked_end(whole, len(prompt), end, marks, self.special)
        return prompt, whole[len(prompt) : end]

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each rendered text, without any that the tokenizer would add; one call for all."""
        if self._segments is not None:
            return self._segments.token_ids(texts)
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return ids

    def _render(self, messages: Sequence[Message], tools: Any, generation: bool) -> tuple[str, list[Span]]:
        """The text of messages, and what of it is marked; with ``generation``, marks are not asked for."""
        try:
            _refuse_random(self.text)
            if self.has_marks and not generation:
                return render_with_marks(self.tokenizer, self.text, messages, tools)
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=generation, chat_template=self.text
            )
        except (TimeoutError, InputError):
            raise
        except Exception as error:  # whatever a program of others raises
            if any(isinstance(_arguments(call), dict) for m in messages for call in m.get("tool_calls") or ()):
                return self._render([_with_text_arguments(m) for m in messages], tools, generation)
            said = str(error) or type(error).__name__  # a MemoryError says nothing
            raise InputError(f"the chat template refuses the conversation: {said}") from error
        return str(text), []

    def _end(self, answer: str) -> int:
        """Where the stop token ends: among the special tokens that end the text, the one that stops a plain answer."""
        trailing = list(_trailing(self.special, answer))
        if not trailing:
            raise InputError(
                "the chat template puts no stop token after the answer, so the model would never learn to stop. Add "
                "the end-of-turn token to the template: data.chat_template."
            )
        plain = [token for token in trailing if token.group() == self._plain_stop]
        if plain:
            return plain[0].end()
        together = trailing[0]
        for token in trailing[1:]:
            if token.start() == together.end():
                together = token
        return together.end()

    @property
    def stop_id(self) -> int | None:
        """Id of the token that ends an answer; ``None`` where the template has none."""
        stop = self._plain_stop
        return None if stop is None else cast(int, self.tokenizer.convert_tokens_to_ids(stop))

    @cached_property
    def _plain_stop(self) -> str | None:
        """The special token that follows the answer of a plain exchange."""
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        try:
            whole = self.render(turns, None, generation=False)
        except InputError:
            return None
        return next((token.group() for token in _trailing(self.special, whole)), None)


@lru_cache(maxsize=8)
def _chat_template(tokenizer: PreTrainedTokenizerBase, template: str) -> ChatTemplate:
    return ChatTemplate(tokenizer)


def _too_late(number: int, frame: Any) -> None:
    raise TimeoutError(f"the chat template has not rendered it after {MAX_SECONDS:g} s: look for a loop in it")


def _trailing(special: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """The special tokens at the end of a text with nothing but whitespace between and after them, in order."""
    tokens = list(special.finditer(text))
    begin, end = len(tokens), len(text)
    while begin and not text[tokens[begin - 1].end() : end].strip():
        begin -= 1
        end = tokens[begin].start()
    yield from tokens[begin:]


def _payload(message: Message) -> Iterator[str]:
    """The texts of a message that have to be in what is trained."""
    for text in (message.get("reasoning_content"), message.get("content")):
        if text and text.strip():
            yield text.strip()
    for call in message.get("tool_calls") or ():
        yield call["function"]["name"]
        yield from texts_in(_arguments(call))


def texts_in(value: Any) -> Iterator[str]:
    """Every string in nested lists and mappings, their keys included."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from texts_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from texts_in(inner)
    elif isinstance(value, str):
        yield value


def _frozen(template: str) -> str:
    """The template with ``strftime_now`` overridden to return only :data:`FROZEN_DATE`.

    A macro at the beginning hides the function of transformers however it is called or renamed, and is part of the text
    that names a cache's entry. The newline after it is trimmed, so what a template renders is otherwise the same.
    """
    if "strftime_now" not in template:
        return template
    codes = [flag + letter for flag in ("", *"-_0^#") for letter in ascii_letters]
    texts = {code: FROZEN_DATE.strftime(f"%{code}") for code in codes}
    known = json.dumps({code: text for code, text in texts.items() if text != f"%{code}"})
    return (
        f"{{% macro strftime_now(format) %}}{{% set known = {known} %}}{{% for part in format.split('%%') %}}"
        "{{ '' if loop.first else '%' }}{% for piece in part.split('%') %}"
        "{% if loop.first %}{{ piece }}{% elif piece[:2] in known %}{{ known[piece[:2]] }}{{ piece[2:] }}"
        "{% elif piece[:1] in known %}{{ known[piece[:1]] }}{{ piece[1:] }}{% else %}%{{ piece }}{% endif %}"
        f"{{% endfor %}}{{% endfor %}}{{% endmacro %}}\n{template}"
    )


@lru_cache(maxsize=8)
def _refuse_random(template: str) -> None:
    """Refuse a template that would be rendered differently each time, as by ``random`` and ``lipsum`` of jinja2."""
    if "random" in template or "lipsum" in template:
        tree = _compile_jinja_template(template).environment.parse(template)
        filters = {node.name for node in tree.find_all(nodes.Filter)}
        names = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
        if found := sorted(filters & {"random"} | names & {"lipsum"}):
            raise InputError(
                f"the chat template draws at random ({found[0]}), so no run could be repeated. Give another with "
                "data.chat_template."
            )


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


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
