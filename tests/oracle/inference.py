"""What a model is given at inference: conversations rendered and tokenized by transformers and tokenizers alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from datetime import date
from functools import cached_property
from typing import Any
from unittest.mock import patch

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from tests.oracle.fields import MARKUP, Leaf, Message, fields_of

_OPEN, _CLOSE, _FIRST_MARK = "\ue000", "\ue001", 0xE100  # of the private use area, for control tokens of texts


class Clock:
    """The date that templates are told."""

    @staticmethod
    def now() -> date:
        return date(2024, 7, 26)


class Inference:
    """One conversation as a server renders it, in the only form that its template takes.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: The turns.
        tools: Tools that the template is given.
        variables: Further variables of the template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], tools: Any, variables: Mapping[str, Any]
    ) -> None:
        self.tokenizer, self.variables = tokenizer, dict(variables)
        self.hidden: list[str] = []
        self._control = _control_pattern(tokenizer)
        self.tools = self._hide(tools) if tools else tools
        self.messages: list[Message] = [self._hide(message) for message in messages]
        self.given = list(self.messages)
        self.merged = 0
        self.forms: list[str] = []
        self._take_form("parts", as_parts, self._is_blind_to_strings)
        self._take_form("merged", merged, self._refuses_system)
        self._take_form("arguments as text", with_text_arguments, self._refuses_arguments)

    def text(self, end: int | Sequence[Message], generation: bool) -> str:
        """The first ``end`` messages as they are rendered; control tokens of texts are marks in it.

        Raises:
            Exception: Whatever the template raises.
        """
        messages = self.messages[: end - self.merged] if isinstance(end, int) else end
        return self._render(messages, generation)

    def prompt(self, turn: int) -> str:
        """The text that a turn is generated after."""
        return self.text(turn, generation=True)

    def contexts(self, turn: int) -> list[list[int]]:
        """The ids that a turn is generated after: one way, or two where a text has control tokens.

        As plain text these may be tokenized together with what is around them, or apart as transformers does it.
        """
        messages = self.messages[: turn - self.merged]
        if not self.hidden:
            return [self._tokenized(messages)]
        return [
            self.ids(self.prompt(turn)),
            self._tokenized(self._without_marks(messages), sanitize_control_tokens=True),
        ]

    def ids(self, text: str) -> list[int]:
        """Ids of a rendered text, with what stands for a control token of a message as plain text."""
        if not any(ord(mark) >= _FIRST_MARK and ord(mark) < _FIRST_MARK + len(self.hidden) for mark in set(text)):
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids
        renamed = self.added.sub(lambda match: _name(match.group()), text)
        return self._renamed.encode(self.shown(renamed), add_special_tokens=False).ids

    def shared(self, prompt: str, whole: str) -> int:
        """How far a render begins with a prompt, up to the beginning of a token that both have in another way."""
        pairs = enumerate(zip(prompt, whole, strict=False))
        end = next((n for n, (a, b) in pairs if a != b), min(len(prompt), len(whole)))
        for text in (prompt, whole):
            for token in self.added.finditer(text):
                if token.start() < end < token.end():
                    end = token.start()
        return end

    def shown(self, text: str) -> str:
        """A rendered text with the control tokens of messages in it."""
        for number, token in enumerate(self.hidden):
            text = text.replace(chr(_FIRST_MARK + number), token)
        return text

    def with_text(self, turn: int, text: str) -> Inference:
        """The same conversation with another text in a turn."""
        other = copy(self)
        content: Any = [{"type": "text", "text": text}] if "parts" in self.forms else text
        other.messages = list(self.messages)
        other.messages[turn - self.merged] = {**self.messages[turn - self.merged], "content": content}
        return other

    def fields(self, turn: int) -> list[Leaf]:
        """What an answer says, as it would stand in a rendered text."""
        message = self.messages[turn - self.merged]
        if isinstance(message.get("content"), list):
            message = {**message, "content": message["content"][0]["text"]}
        return [self.with_marks(value) if isinstance(value, str) else value for value in fields_of(message)]

    def texts_before(self, turn: int) -> list[str]:
        """The texts of the turns before one, as they would stand in a rendered text."""
        before = [message.get("content") or "" for message in self.messages[: turn - self.merged]]
        texts = [text if isinstance(text, str) else text[0]["text"] for text in before]
        return [self.with_marks(text).strip() for text in texts if text.strip()]

    def _tokenized(self, messages: Sequence[Message], **more: Any) -> list[int]:
        with patch.object(chat_template_utils, "datetime", Clock):
            ids: list[int] = self.tokenizer.apply_chat_template(
                list(messages),
                tools=self._without_marks(self.tools),
                add_generation_prompt=True,
                return_dict=True,
                **more,
                **self.variables,
            )["input_ids"]
        return ids

    def _render(self, messages: Sequence[Message], generation: bool, tools: Any = ...) -> str:
        with patch.object(chat_template_utils, "datetime", Clock):
            text = str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=self.tools if tools is ... else tools,
                    add_generation_prompt=generation,
                    tokenize=False,
                    **self.variables,
                )
            )
        return self.with_marks(text)

    def with_marks(self, text: str) -> str:
        """A text with one mark for each control token of messages."""
        for number, token in enumerate(self.hidden):
            text = text.replace(f"{_OPEN}{token}{_CLOSE}", chr(_FIRST_MARK + number))
        return text.replace(_OPEN, "").replace(_CLOSE, "")

    def _hide(self, value: Any) -> Any:
        """The same value with a mark for each control token of its texts."""
        if isinstance(value, str):
            return self._control.sub(self._mark, value)
        if isinstance(value, Mapping):
            return {self._hide(key): self._hide(inner) for key, inner in value.items()}
        return [self._hide(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    def _without_marks(self, value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(_OPEN, "").replace(_CLOSE, "")
        if isinstance(value, Mapping):
            return {self._without_marks(key): self._without_marks(inner) for key, inner in value.items()}
        return [self._without_marks(inner) for inner in value] if isinstance(value, list) else value

    def _mark(self, match: re.Match[str]) -> str:
        if match.group() not in self.hidden:
            self.hidden.append(match.group())
        return f"{_OPEN}{match.group()}{_CLOSE}"  # the template sees what it would see without marks

    def _take_form(
        self, name: str, change: Callable[[list[Message]], list[Message]], needed: Callable[[], bool]
    ) -> None:
        if needed():
            before = len(self.messages)
            self.messages = change(self.messages)
            self.merged += before - len(self.messages)
            self.forms.append(name)

    def _is_blind_to_strings(self) -> bool:
        turns: list[Message] = [{"role": "user", "content": "Zqv1"}, {"role": "assistant", "content": "Zqv2"}]
        return not self._shows(turns, "Zqv1", "Zqv2") and self._shows(as_parts(turns), "Zqv1", "Zqv2")

    def _refuses_system(self) -> bool:
        system: Message = {"role": "system", "content": "Zqv1"}
        turns: list[Message] = [system, {"role": "user", "content": "Zqv2"}]
        if [message["role"] for message in self.messages[:2]] != ["system", "user"]:
            return False
        turns = as_parts(turns) if "parts" in self.forms else turns
        return not self._renders(turns) and self._renders(turns[1:])

    def _refuses_arguments(self) -> bool:
        if not any(message.get("tool_calls") for message in self.messages):
            return False
        return not self._renders(self.messages) and self._renders(with_text_arguments(self.messages))

    def _renders(self, messages: Sequence[Message]) -> bool:
        try:
            self._render(messages, generation=False)
        except Exception:
            return False
        return True

    def _shows(self, messages: Sequence[Message], *texts: str) -> bool:
        try:
            whole = self._render(messages, generation=False, tools=None)
        except Exception:
            return False
        return all(text in whole for text in texts) and "'type'" not in whole

    @cached_property
    def added(self) -> re.Pattern[str]:
        """Matches an added token."""
        contents = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))))

    @cached_property
    def _renamed(self) -> Tokenizer:
        """The tokenizer with another text for each added token, so that the texts they have now are plain text."""
        data = json.loads(self.tokenizer.backend_tokenizer.to_str())
        names = {token["content"]: _name(token["content"]) for token in data["added_tokens"]}
        for token in data["added_tokens"]:
            token["content"] = names[token["content"]]
        model = data["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(token, token): number for token, number in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        data["post_processor"] = None
        return Tokenizer.from_str(json.dumps(data))


def as_parts(messages: Sequence[Message]) -> list[Message]:
    """The same turns with each text as a list of one part."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def merged(messages: Sequence[Message]) -> list[Message]:
    """The same turns with that of the system at the beginning of the user's."""
    system, first, *others = messages
    if isinstance(first["content"], str):
        return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *others]
    text = f"{system['content'][0]['text']}\n\n{first['content'][0]['text']}"
    return [{**first, "content": [{"type": "text", "text": text}]}, *others]


def with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """The same turns with the arguments of tool calls as JSON text."""
    changed = []
    for message in messages:
        if message.get("tool_calls"):
            calls = [
                {**call, "function": {**call["function"], "arguments": json.dumps(own, ensure_ascii=False)}}
                for call in message["tool_calls"]
                for own in [call["function"]["arguments"]]
            ]
            message = {**message, "tool_calls": calls}
        changed.append(message)
    return changed


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """Tokens that begin or end something: special ones, and added ones that the template writes as its own."""
    template = str(tokenizer.chat_template)
    added = tokenizer.added_tokens_decoder.values()
    found = {str(token) for token in added if token.special or str(token) in template}
    return {token for token in found if not MARKUP.fullmatch(token) and token.strip()}


def _control_pattern(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    found = sorted(control_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found)) or r"(?!)")


def _name(token: str) -> str:
    """Another text for an added token, that no text and no other token has in it."""
    return "\uf8ff" + "".join(chr(0xF000 + ord(letter) % 0x7FF) for letter in token) + "\uf8fe"
