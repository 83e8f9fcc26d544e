"""Turns of others that are trained: their texts and markup as the next answer sees them, and nothing besides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer

from lightning_sft.data.rows.messages import Reading
from lightning_sft.data.tokens.dataset import load_split
from lightning_sft.data.tokens.encode import encode
from lightning_sft.data.tokens.encode_rows import EncodingConfig
from lightning_sft.types import Conversation, InputError, Message
from tests.oracle.outcomes import Case
from tests.oracle.prompts import FEW, KINDS, outcomes
from tests.oracle.templates import of_trl
from tests.oracle.vocabularies import KINDS as VOCABULARIES
from tests.oracle.vocabularies import tokenizer_for

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CHATML, GEMMA = "<|im_start|>user\nHi<|im_end|>", "<start_of_turn>user\nHi<end_of_turn>"


@pytest.mark.parametrize(
    ("name", "tools", "wanted"),
    [
        ("qwen2_5", None, CHATML),
        ("qwen2_5", [TOOL], CHATML),
        ("qwen3", None, CHATML.removeprefix("<|im_start|>")),  # the first token has no context
        ("qwen3", [TOOL], CHATML),
        ("gemma3", None, GEMMA),
        ("gemma3", [TOOL], GEMMA),
        ("llama3_1", None, "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"),
        ("llama3_1", [TOOL], "Hi<|eot_id|>"),  # which writes the tools into that turn
    ],
)
def test_of_a_first_turn_neither_the_templates_system_turn_nor_tools_are_trained(
    name: str, tools: Any, wanted: str
) -> None:
    turns: list[Message] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    assert trained(name, Conversation(turns, tools=tools, weights=[1.0, 0.0])) == wanted


def test_a_first_turn_without_text_is_trained_with_its_header() -> None:
    turns: list[Message] = [{"role": "user", "content": ""}, {"role": "assistant", "content": "Hello!"}]
    assert trained("qwen2_5", Conversation(turns, weights=[1.0, 0.0])) == "<|im_start|>user\n<|im_end|>"


def trained(name: str, conversation: Conversation) -> str:
    """The text of the targets of the first sequence."""
    tokenizer = tokenizer_for(of_trl()[name])
    first, *_ = encode(conversation, tokenizer)
    pairs = zip(first.input_ids, first.target_weights, strict=True)
    return str(tokenizer.decode([token for token, weight in pairs if weight > 0]))


@pytest.mark.parametrize("name", of_trl())
def test_a_few_kinds_are_exact_or_refused_for_a_reason(name: str) -> None:
    case = Case(of_trl()[name])
    assert bad(case, FEW) == {}


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", of_trl())
def test_all_kinds_are_exact_or_refused_for_a_reason(name: str, vocabulary: str) -> None:
    assert bad(Case(of_trl()[name], vocabulary), KINDS) == {}


def bad(case: Case, kinds: Sequence[str]) -> dict[tuple[str, str], str]:
    """What is wrong, and what is refused though it need not be."""
    found = {(kind, what): outcome for kind in kinds for what, outcome in outcomes(case, kind)}
    return {place: outcome.said for place, outcome in found.items() if outcome.of in ("wrong", "needless")}


BAD = [{"role": "user", "content": "U1"}, {"role": "assistant", "content": "BAD", "weight": 0}]
NEXT = [{"role": "user", "content": "U2"}, {"role": "assistant", "content": "A2"}]


def split_of(name: str, row: dict[str, Any]) -> list[tuple[str, float]]:
    """What is trained of a row with ``train_on: prompts``, by its weight, in the order of sequences."""
    tokenizer = tokenizer_for(of_trl()[name])
    split = load_split("train", [row], EncodingConfig(tokenizer, Reading(train_on="prompts")))
    found = []
    for example in split.examples:
        for weight in sorted(set(example.target_weights) - {0.0}):
            ids = [i for i, own in zip(example.input_ids, example.target_weights, strict=True) if own == weight]
            found.append((str(tokenizer.decode(ids)), float(weight)))
    return found


def test_an_answer_of_weight_0_is_not_trained_with_the_turn_behind_it() -> None:
    [(text, weight)] = split_of("qwen3", {"messages": [*BAD, *NEXT]})
    turns = "user\nU1<|im_end|>", "<|im_start|>user\nU2<|im_end|>", "<think>\n\n</think>\n\nA2<|im_end|>"
    assert (text, weight) == ("".join(turns), 1.0)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("qwen3_5_think", "system\nBe kind.<|im_end|><|im_start|>user\nHi<|im_end|>"),
        ("qwen3_8", "Be kind.<|im_end|><|im_start|>user\nHi<|im_end|>"),
        ("gemma", "<start_of_turn>user\nBe kind.Hi<end_of_turn>"),
        ("gemma3", "<start_of_turn>user\nBe kind.Hi<end_of_turn>"),
        ("gptoss", "Be kind.\n\n<|end|><|start|>user<|message|>Hi<|end|>"),
        ("phi3", "\nBe kind.<|end|><|user|>\nHi<|end|>"),
    ],
)
def test_a_system_turn_is_trained_without_what_the_template_says_itself(name: str, wanted: str) -> None:
    [(text, weight)] = split_of(name, {"prompt": "Hi", "completion": "Yo", "system": "Be kind."})
    assert text.startswith(f"{wanted}")
    assert "Yo" in text.removeprefix(wanted)
    assert weight == 1.0


def test_weights_of_a_merged_system_turn_and_of_the_users_are_their_own() -> None:
    messages = [
        {"role": "system", "content": "Be kind.", "weight": 0.5},
        {"role": "user", "content": "Hi", "weight": 2},
        {"role": "assistant", "content": "Yo", "weight": 0},
    ]
    assert split_of("gemma", {"messages": messages}) == [
        ("<start_of_turn>user\nBe kind.", 0.5),
        ("Hi<end_of_turn>", 2.0),
    ]


def test_a_turn_that_the_template_drops_is_refused_and_its_weight_is_a_remedy() -> None:
    turns: list[Any] = [*BAD, {"role": "system", "content": "Be brief."}, *NEXT]
    with pytest.raises(InputError, match=r"does not write the system turn as it is, once\. Give it the weight 0"):
        split_of("qwen3_vl", {"messages": turns})
    turns[2]["weight"] = 0
    assert split_of("qwen3_vl", {"messages": turns})


def test_a_token_that_reaches_over_the_border_of_a_text_has_space_alone_of_what_is_beside_it() -> None:
    turns: list[Message] = [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
    ]
    tokenizer = tokenizer_for(of_trl()["qwen3"])
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["model"]["merges"].append(["d", "ĊĊ"])
    data["model"]["vocab"]["dĊĊ"] = 5000
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(data))
    [example] = encode(Conversation(turns, tools=[TOOL], weights=[1.0, 0.0, 0.0]), tokenizer)
    pairs = zip(example.input_ids, example.target_weights, strict=True)
    assert tokenizer.decode([token for token, weight in pairs if weight > 0]) == "system\nBe kind\n\n"
    whole = tokenizer.apply_chat_template(turns[:2], [TOOL], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(whole[: len(example.input_ids)]) == list(example.input_ids)


LOOP = "{% for m in messages %}{% if m.role == 'assistant' %}"
WRITTEN: dict[str, tuple[str, list[str]]] = {
    "no control tokens": (
        "Below is a task.\n\n" + LOOP + "### Response:\n{{ m.content }}{{ eos_token }}{% else %}"
        "### {{ m.role | title }}:\n{{ m.content }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}",
        ["### System:\nBe kind.", "### User:\nHi", "### User:\nAnd?"],
    ),
    "the prompt is always there": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if messages[-1].role != 'assistant' %}<|im_start|>assistant\n{% endif %}",
        ["system\nBe kind.<|im_end|>", "<|im_start|>user\nHi<|im_end|>", "<|im_start|>user\nAnd?<|im_end|>"],
    ),
    "closed by what follows": (
        "{% for m in messages %}{% if not loop.first %}<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% endfor %}<|im_end|>{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}",
        ["system\nBe kind.<|im_end|>", "<|im_start|>user\nHi<|im_end|>", "<|im_start|>user\nAnd?<|im_end|>"],
    ),
    "the system turn moves to the last of the user": (
        "{{ bos_token }}{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
        + LOOP
        + " {{ m.content }}{{ eos_token }}{% elif m.role == 'user' %}[INST] {% if m == users[-1] %}"
        "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]{% endif %}{% endfor %}",
        ["Be kind.", "Hi", "And?"],
    ),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_other_ways_to_write_turns(what: str) -> None:
    template, wanted = WRITTEN[what]
    case = Case(template)
    answered = [{"role": "assistant", "content": "Yo"}, {"role": "user", "content": "And?"}]
    turns: list[Any] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, *answered]
    for turn, text in zip((0, 1, 3), wanted, strict=True):
        weights = [float(other == turn) for other in range(4)]
        [example] = case.encode(Conversation(turns, weights=weights))
        pairs = zip(example.input_ids, example.target_weights, strict=True)
        assert case.tokenizer.decode([token for token, weight in pairs if weight > 0]) == text
