"""Why a conversation cannot be trained exactly with a template, by nobody's code; or that it can."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_sft.types import Conversation
from tests.oracle.endings import ending_of
from tests.oracle.fields import Message, fields_of, missing
from tests.oracle.inference import Inference
from tests.oracle.judge import inference_of, trained_turns, with_sentinels

REASONS = {
    "t": "the template itself raises an error on the conversation",
    "c": "the template does not write tool calls",
    "l": "the template writes the tool call, but not the text beside it",
    "p": "the template writes what stands before a tool call in another way once it is there",
    "s": "the template writes nothing that generation could stop at",
    "h": "the prompt has ended the thought that the answer begins with",
    "e": "the template writes a stop in the middle of the answer, where generation would end",
    "o": "the prompt opens a thought, and the template writes the tool call without one",
}


def impossible(inference: Inference, conversation: Conversation, known: Sequence[str]) -> str:
    """The letter of the reason why an answer cannot be trained exactly; empty where all can.

    Args:
        inference: The conversation, as a server renders it.
        conversation: The conversation.
        known: Tokens that generation stops at.
    """
    sentinels = inference_of(inference.tokenizer, with_sentinels(inference.tokenizer, conversation).conversation)
    for turn in trained_turns(conversation):
        message = conversation.messages[turn]
        try:
            prompt, whole = sentinels.prompt(turn), sentinels.text(turn + 1, generation=False)
            inference.text(turn + 1, generation=False)
            ending = ending_of(sentinels, turn, known)
        except Exception:
            return "t"
        shared = sentinels.shared(prompt, whole)
        if message.get("tool_calls"):
            alone = {key: value for key, value in message.items() if key == "tool_calls"}
            num_values = len(list(fields_of(alone)))
            if missing(sentinels.fields(turn)[-num_values:], whole[shared:]):
                return "c"
            if len(prompt) - shared > 200 or any(
                _text(before) in prompt[shared:] for before in sentinels.messages[:turn]
            ):
                return "p"
            if (message.get("content") or "").strip() and _lost_text(sentinels, turn, whole[shared:]):
                return "l"
            if re.search(r"<think>\s*\Z", prompt) and not re.match(r"\s*<think>|.*</think>", whole[shared:], re.DOTALL):
                return "o"
        if not ending.stops:
            return "s"
        if ending.is_interrupted:
            return "e"
        has_thought = message.get("reasoning_content") or "<think>" in (message.get("content") or "")
        if has_thought and re.search(r"(</(\w+:)?think[\w:]*>|\[/THINK\])\s*\Z", prompt):
            return "h"
    return ""


def _lost_text(inference: Inference, turn: int, written: str) -> bool:
    return _text(inference.messages[turn - inference.merged]) not in written


def _text(message: Message) -> str:
    content = message.get("content") or ""
    return (content if isinstance(content, str) else content[0]["text"]).strip() or "\x00"
