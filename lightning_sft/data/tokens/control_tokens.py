"""Control tokens in the texts of a conversation, where they would begin or end a turn that nobody has written.

By default they are text. A template is given each between two marks, and the rendered text is tokenized with what
stands between marks as plain text, as ``apply_chat_template(..., sanitize_control_tokens=True)`` of transformers does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from lightning_sft.types import InputError, Message

Treatment = Literal["text", "refuse", "as_is"]
"""A control token in a text is tokenized as plain text, a reason to refuse the row, or the token that it is."""

_MARKUP = re.compile(r"(?i)</?(think|thought|reason|answer|tool|arg_|function|param|call)\w*>|\[/?THINK\]")
_MARK, _, _END = mark_control_tokens("x", re.compile("x"))


def pattern_of(tokenizer: PreTrainedTokenizerBase, template: str) -> re.Pattern[str]:
    """Matches a control token: a special token, or an added one that the template writes.

    Tags of thoughts and tool calls are none: they are part of what an answer says, and begin no turn.
    """
    added = tokenizer.added_tokens_decoder.values()
    own = [str(token) for token in added if token.special or (str(token).strip() and str(token) in template)]
    always = {token for token in tokenizer.all_special_tokens if token}
    return any_of({token for token in own if not _MARKUP.fullmatch(token)} | always)


def ending_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches any added token that may end or begin a turn: none of space, and no tag of a thought or tool call."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    kept = {token for token in added if token.strip() and not _MARKUP.fullmatch(token)}
    return any_of(kept.union(token for token in tokenizer.all_special_tokens if token.strip()))


def treated(
    messages: list[Message], tools: Any, special: re.Pattern[str], treatment: Treatment
) -> tuple[list[Message], Any, str]:
    """Messages and tools with the control tokens in their texts marked, and what was done with them, if there are any.

    Raises:
        InputError: When there are some, and ``treatment`` is ``refuse``; or in the name of an argument.
    """
    if not special.search("\0".join(text for text, _ in _texts([messages, tools]))):  # most have none: found quickly
        return messages, tools, ""
    places: dict[str, Any] = {
        f"turn {number} ({message['role']})": message for number, message in enumerate(messages, 1)
    }
    places["a tool's description"] = list(tools or ())
    found = list(_found(places, special))
    if not found:
        return messages, tools, ""
    where, token, is_key = max(found, key=itemgetter(2))
    if treatment == "as_is":
        return messages, tools, "left as the tokens that they are"
    if treatment == "refuse" or is_key:
        raise InputError(
            f"{where} contains the control token {token!r}, which would begin or end a turn. Remove it from the text"
            + ("." if is_key else ", or set data.control_tokens=text.")
        )
    return mark_control_tokens(messages, special), mark_control_tokens(tools, special), "tokenized as plain text"


def is_marked(text: str) -> bool:
    """Whether a rendered text has marks."""
    return _MARK in text


def unmarked(text: str) -> str:
    """A text without its marks."""
    return text.replace(_MARK, "").replace(_END, "")


def without_marked(text: str) -> str:
    """A text without the control tokens that are marked in it."""
    return re.sub(f"{_MARK}.*?{_END}", "", text) if _MARK in text else text


def marked_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text with marks.

    Raises:
        InputError: When the tokenizer makes a control token of plain text.
    """
    try:
        return encode_marked_chat(tokenizer, text)
    except ValueError as error:
        raise InputError(f"{error}. Remove it from the row.") from error


def _found(places: Mapping[str, Any], special: re.Pattern[str]) -> Iterator[tuple[str, str, bool]]:
    """Where control tokens are, the first of each text, and whether it stands in a key, which cannot be marked."""
    for where, value in places.items():
        for text, is_key in _texts(value):
            if match := special.search(text):
                yield where, match.group(), is_key


def _texts(value: Any) -> Iterator[tuple[str, bool]]:
    if isinstance(value, str):
        yield value, False
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key), True
            yield from _texts(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _texts(inner)


def any_of(texts: Collection[str]) -> re.Pattern[str]:
    """Matches the longest of some texts; a vocabulary may have thousands of control tokens that begin alike.

    >>> any_of({"<a", "<ab>", "<b>"}).findall("<ab> <a <b <b>")
    ['<ab>', '<a', '<b>']
    """
    return re.compile(_branches({text for text in texts if text}) or r"(?!)")


def _branches(texts: set[str]) -> str:
    endings: dict[str, set[str]] = {}
    for text in texts - {""}:
        endings.setdefault(text[0], set()).add(text[1:])
    branches = "|".join(re.escape(first) + _branches(rest) for first, rest in sorted(endings.items()))
    if not branches:
        return ""
    return f"(?:{branches}){'?' if '' in texts else ''}" if len(endings) > 1 or "" in texts else branches
