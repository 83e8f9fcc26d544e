"""How data sets name roles and keys of messages: tables, which a run may extend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from lightning_sft.types import InputError

Role = Literal["system", "user", "assistant", "tool"]
"""The roles of the normal form."""

ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai", "agent", "bing", "bard"), "assistant"
    ),
    **dict.fromkeys(("function_call", "function-call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython"), "tool"),
    **dict.fromkeys(("tool_response", "tool_output", "tool_result"), "tool"),
    **dict.fromkeys(("function_response", "function-response", "function_output", "function_result"), "tool"),
}
"""The role that each name stands for; names are compared in lower case."""

CALLERS = frozenset({"function_call", "function-call", "tool_call"})
"""Names of an assistant whose content is a tool call."""

KEYS: dict[str, tuple[str, ...]] = {
    "role": ("role", "from", "speaker", "author", "sender", "type"),
    "content": ("content", "value", "text", "message", "utterance", "parts"),
    "reasoning_content": ("reasoning_content", "thinking", "reasoning", "reasoning_details", "thinking_blocks"),
    "tool_calls": ("tool_calls",),
    "function_call": ("function_call",),
    "name": ("name", "tool_name"),
    "tool_call_id": ("tool_call_id",),
    "loss": ("loss",),
    "train": ("train", "train_on_turn"),
    "weight": ("weight",),
    "loss_weight": ("loss_weight", "loss_scale"),
}
"""The keys that a message may have, each with its names; the first that is there counts."""

IGNORED = frozenset(
    [
        # of whom, when and where it is
        *("name", "author", "speaker", "sender", "user_id", "timestamp", "time", "date", "datetime", "create_time"),
        *("created_at", "created_date", "update_time", "country", "state", "lang", "language", "hashed_ip", "header"),
        # of its place in a conversation or data set
        *("id", "message_id", "msg_id", "uuid", "parent_id", "message_tree_id", "index", "idx", "position", "rank"),
        *("turn", "turn_id", "turn_identifier", "response_id", "object", "type", "status"),
        # of an interface that made it
        *("annotations", "cache_control", "citations", "logprobs", "model", "finish_reason", "stop_reason"),
        *("stop_sequence", "usage", "usage_metadata", "response_metadata", "provider_specific_fields", "metadata"),
        *("token_count", "num_tokens", "openai", "source", "agent", "message_type", "markdown", "done", "done_reason"),
        *("eval_count", "eval_duration", "prompt_eval_count", "prompt_eval_duration", "total_duration"),
        "load_duration",
        # of those who rated it
        *("toxic", "redacted", "deleted", "synthetic", "review_count", "review_result", "emojis", "score", "rating"),
    ]
)
"""Keys of messages that say nothing to a model: they are ignored and counted."""

IGNORE = "ignored"
"""What a key is mapped to that says nothing; so is a part of the content with a thought, by its type."""


@dataclass(frozen=True)
class Dialect:
    """The names that a data set has for roles and keys, beside those of the tables.

    Args:
        roles: Role of the normal form for each name.
        keys: Key of the normal form for each name, or ``ignored`` where it says nothing.

    Raises:
        InputError: When a name is mapped to something else.

    >>> dialect = Dialect({"narrator": "user"}, {"mood": "ignored"})
    >>> dialect.role("Narrator"), dialect.role("gpt"), "mood" in dialect.ignored
    ('user', 'assistant', True)
    """

    roles: Mapping[str, str]
    keys: Mapping[str, str]

    def __post_init__(self) -> None:
        for name, role in self.roles.items():
            if role not in get_args(Role):
                raise InputError(f"data.roles={{{name}: {role}}}: {role!r} is no role. {_one_of(get_args(Role))}")
        for name, key in self.keys.items():
            if key not in KEYS and key != IGNORE:
                raise InputError(
                    f"data.message_keys={{{name}: {key}}}: {key!r} is no key of a message. {_one_of([*KEYS, IGNORE])}"
                )

    @cached_property
    def names(self) -> dict[str, tuple[str, ...]]:
        """The names of each key, those of the data set first."""
        return {
            key: (
                *(own for own, meaning in self.keys.items() if meaning == key),
                *(n for n in known if n not in self.keys),
            )
            for key, known in KEYS.items()
        }

    @cached_property
    def flags(self) -> frozenset[str]:
        """The names of the keys that give a message its weight."""
        return frozenset(name for key in ("loss", "train", "weight", "loss_weight") for name in self.names[key])

    @cached_property
    def ignored(self) -> frozenset[str]:
        """The keys that say nothing."""
        return IGNORED.union(name for name, meaning in self.keys.items() if meaning == IGNORE)

    @cached_property
    def _roles(self) -> dict[str, str]:
        return ROLES | {name.lower(): role for name, role in self.roles.items()}

    def role(self, name: str) -> str | None:
        """The role that a name stands for, or ``None`` where it is not known."""
        return self._roles.get(name) or self._roles.get(name.lower())


def _one_of(names: Iterable[str]) -> str:
    return f"Give the data's name first and one of {', '.join(names)} second."


COMMON = Dialect({}, {})
"""The tables alone."""
