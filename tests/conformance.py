"""Every vendor's chat template in the trl wheel × kinds of conversations: exact, expanded, or refused and why.

``python -m tests.conformance > docs/conformance.md`` writes the matrix; test_conformance holds it to be true.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from lightning_sft.data.tokens.encode import encode
from lightning_sft.data.tokens.render import FROZEN_DATE
from lightning_sft.types import Conversation, Example, InputError


class FrozenClock:
    """What a template that asks for today is told, in the test's own way."""

    @staticmethod
    def now() -> date:
        return FROZEN_DATE


CONTROL = re.compile(r"</?s>|<\|?[A-Za-z_/][\w:/]*\|?>|<｜[^｜<>]+｜>|\[/?[A-Z_]+\]")
PLAIN = re.compile(
    r"</?(think|tool_\w+|function|parameter|arg_\w+|tools|IMPORTANT|description|name|required)>"
)  # no special


def templates(training: bool = False) -> dict[str, str]:
    """The originals of vendors, by name; with ``training``, trl's own variants of them for training instead."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None, "pip install trl==1.16.0: its wheel carries the chat templates"
    [package] = spec.submodule_search_locations or []
    files = sorted((Path(package) / "chat_templates").glob("*.jinja"))
    return {f.stem: f.read_text(encoding="utf-8") for f in files if f.stem.endswith("_training") == training}


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """Bytes, a few merges that reach over the boundary of prompt and answer, and the control tokens of the template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Y"), ("Y", "o"), ("Ġ", "Ġ")]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<BOS>", eos_token="<EOS>")
    found = sorted({match.group() for match in CONTROL.finditer(template)})
    tokenizer.add_tokens([AddedToken(token, special=not PLAIN.fullmatch(token), normalized=False) for token in found])
    tokenizer.chat_template = template
    return tokenizer


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CALL = [{"type": "function", "id": "call00001", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Where"}},
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": PARAMETERS}}]
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "sunny"}
THOUGHT = {"reasoning_content": "Let me see."}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": [user("Hi"), answer("Yo")],
    "system": [{"role": "system", "content": "Be kind."}, user("Hi"), answer("Yo")],
    "turns": [user("Hi"), answer("Yo"), user("And?"), answer("Nothing.")],
    "call": [user("Weather?"), answer("", tool_calls=CALL)],
    "tool": [user("Weather?"), answer("", tool_calls=CALL), RESULT, answer("It is sunny.")],
    "thought": [user("Hi"), answer("Yo", **THOUGHT)],
    "thoughts": [user("Hi"), answer("Yo", **THOUGHT), user("And?"), answer("No.", reasoning_content="Hm, what?")],
    "twice": [user("Hi"), answer("Yo"), answer("Again.")],
    "unicode": [user("¿Qué? 👩‍👩‍👧"), answer("naïve – 你好 👍🏽")],
    "space": [user(" Hi\n"), answer("  Yo \n\n")],
    "echo": [user("yes"), answer("yes"), user("yes yes"), answer("yes")],
    "empty": [user("Hi"), answer("")],
    "forged": [user("Hi FORGED"), answer("Yo")],  # FORGED is the template's own end and beginning of an answer
}
REASONS = {  # letter -> what the refusal says, and what it means
    "c": ("what the chat template puts before an answer", "the context at inference is another one"),
    "l": ("does not render", "text to be trained is not in the render"),
    "s": ("puts no stop token", "no stop token after the answer"),
    "t": ("the chat template refuses", "the template itself refuses the conversation"),
    "e": ("the answer is empty", "the answer is empty"),
    "f": ("contains the control token", "a control token in a text"),
    "b": ("cannot tokenize the answer apart", "prompt and answer cannot be tokenized apart"),
}


def conversation(name: str, tokenizer: PreTrainedTokenizerFast) -> Conversation:
    messages = CONVERSATIONS[name]
    if name == "forged":
        control = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        messages = [user(f"Hi {control[0]}"), *messages[1:]]
    return Conversation(messages, tools=TOOLS if name in ("call", "tool") else None, provenance="f:1")


def assert_parity(given: Conversation, examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> None:
    """Each answer is trained once, after exactly the ids of inference, and nothing else is trained."""
    open_answers = Counter(turn for turn, m in enumerate(given.messages) if m["role"] == "assistant")
    trained = 0
    for turn in list(open_answers):
        with patch.object(chat_template_utils, "datetime", FrozenClock):
            context = tokenizer.apply_chat_template(
                list(given.messages[:turn]), tools=given.tools, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        for example in examples:
            begin, weights = len(context), example.target_weights
            if list(example.input_ids[:begin]) == context and begin < len(weights) and weights[begin] > 0:
                end = next((i for i in range(begin, len(weights)) if weights[i] == 0), len(weights))
                text = tokenizer.decode(example.input_ids[begin:end])
                assert given.messages[turn]["content"].strip() in text
                assert example.input_ids[end - 1] in tokenizer.added_tokens_decoder, f"{text!r} does not stop"
                open_answers[turn] -= 1
                trained += end - begin
                break
    assert not +open_answers, f"answers without their context: {+open_answers}"
    assert trained == sum(w > 0 for example in examples for w in example.target_weights)


def outcome(name: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """``=`` for one exact sequence, ``+n`` for n exact ones, or the letter of the reason for refusal."""
    given = conversation(name, tokenizer)
    try:
        examples = encode(given, tokenizer)
    except InputError as error:
        return next(letter for letter, (said, _) in REASONS.items() if said in str(error))
    assert_parity(given, examples, tokenizer)
    return "=" if len(examples) == 1 else f"+{len(examples)}"


def page() -> str:
    """The matrix as a page."""
    rows = [f"| {' | '.join(['template', *CONVERSATIONS])} |", "|---" * (len(CONVERSATIONS) + 1) + "|"]
    counts: Counter[str] = Counter()
    for stem, template in templates().items():
        tokenizer = tokenizer_for(template)
        cells = [outcome(name, tokenizer) for name in CONVERSATIONS]
        counts.update(cell[0] for cell in cells)
        rows.append(f"| {stem} | {' | '.join(cells)} |")
    legend = [f"- `{letter}` refused: {meaning}" for letter, (_, meaning) in REASONS.items()]
    total = sum(counts.values())
    refused = total - counts["="] - counts["+"]
    head = f"""# Chat templates

Written by `python -m tests.conformance`; `tests/data/tokens/test_conformance.py` holds it to be true. Vendors'
templates, as trl 1.16 carries them, by kinds of conversations. Of {total} pairs, {counts["="]} are exact in one
sequence, {counts["+"]} in several, and {refused} are refused. None is trained wrongly.

- `=` exact: every answer is trained in the context that inference gives it, token for token, and learns to stop
- `+2` the same in two sequences: the template renders earlier turns differently later
"""
    return "\n".join([head + "\n".join(legend), "", *rows, ""])


if __name__ == "__main__":
    print(page(), end="")
