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
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property, lru_cache
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from lightning_sft.data.tokens import thoughts
from lightning_sft.data.tokens.rendering import Rendering
from lightning_sft.data.tokens.template import Template
from lightning_sft.data.tokens.template_config import TemplateConfig, configured
from lightning_sft.types import Conversation, InputError, Message


class ChatTemplate(Template):
    r"""The chat template of a tokenizer.

    >>> from lightning_sft.demos import tiny_tokenizer
    >>> template = ChatTemplate.of(tiny_tokenizer())
    >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    >>> template.prompt_and_answer(turns, None)
    ('<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n', 'Yo<|im_end|>')
    """

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, config: TemplateConfig | None = None) -> ChatTemplate:
        """The template of a tokenizer; made once."""
        settings = json.dumps(asdict(config or configured(tokenizer)), sort_keys=True, default=str)
        return _chat_template(tokenizer, json.dumps([tokenizer.chat_template, tokenizer.special_tokens_map]), settings)

    def prompt_and_answer(self, messages: Sequence[Message], tools: Any) -> tuple[str, str]:
        """What stands before the last message at inference, and its text with its stop token.

        Raises:
            InputError: When the answer cannot be trained after that prompt.
        """
        answer = Rendering(self, Conversation(messages, tools)).answer(len(messages) - 1)
        return answer.text[: answer.begin], answer.own

    def message_of(self, messages: Sequence[Message], written: str) -> Message:
        r"""The answer that the template writes as some text: what a model has generated, as a turn of its conversation.

        Args:
            messages: Messages before it.
            written: Generated text with its control tokens; the stop token may be missing.

        >>> from lightning_sft.demos import tiny_tokenizer
        >>> asked = [{"role": "user", "content": "Hi"}]
        >>> ChatTemplate.of(tiny_tokenizer()).message_of(asked, "Yo<|im_end|>")
        {'role': 'assistant', 'content': 'Yo'}
        """
        for message, whole in sorted(self._readings(messages, written), key=lambda found: _has_space(found[0])):
            try:
                if Rendering(self, Conversation([*messages, message])).answer(len(messages)).own == whole:
                    return message
            except InputError:
                continue
        return _assistant({"content": self.special.sub("", written)})

    def _readings(self, messages: Sequence[Message], written: str) -> Iterator[tuple[Message, str]]:
        """Answers that some text may be, each with the text as the template would write such an answer."""
        for shape in ({"reasoning_content": "x", "content": "y"}, {"content": "y"}):
            try:
                rendering = Rendering(self, Conversation([*messages, _assistant(shape)]))
                ending, prompt = rendering.ending(len(messages)), rendering.prompt(len(messages))
            except InputError:
                continue
            whole = written if written.endswith(ending.stop) else written + ending.stop
            own = whole.removesuffix(ending.stop)
            found = list(_continued(own, prompt))
            if own.startswith(ending.before) and not ending.lost:
                rest, between = own.removeprefix(ending.before), ending.between
                found.append(rest.split(between, 1) if "reasoning_content" in shape and between else [rest])
            yield from (
                (_assistant(dict(zip(shape, parts, strict=True))), whole) for parts in found if len(parts) == len(shape)
            )

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
                tokens = self.endings.findall(rendering.ending(1).stop)
            except InputError:
                continue
            ids |= dict.fromkeys(cast(list[int], self.tokenizer.convert_tokens_to_ids(tokens[-1:])))
        return tuple(ids)


def _continued(text: str, prompt: str) -> Iterator[list[str]]:
    """The thought and the answer in a text, or the answer after an empty thought, where the prompt begins a thought."""
    if opened := thoughts.OPENING.search(prompt):
        closing = thoughts.closing(opened)
        for border in (closing, closing.strip()):
            thought, is_ended, answer = text.partition(border)
            if is_ended:
                yield [thought, answer] if thought.strip() else [answer]


def _has_space(message: Message) -> bool:
    """Whether an answer with a thought has space where a template writes its own: it may rather be all text."""
    thought = message.get("reasoning_content")
    return thought is not None and (thought != thought.strip() or message["content"] != message["content"].lstrip())


def _assistant(fields: dict[str, str]) -> Message:
    return {"role": "assistant", **fields}


@lru_cache(maxsize=8)
def _chat_template(tokenizer: PreTrainedTokenizerBase, template: str, config: str) -> ChatTemplate:
    return ChatTemplate(tokenizer, TemplateConfig(**json.loads(config)))
