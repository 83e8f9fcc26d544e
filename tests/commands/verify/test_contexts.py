"""The check of trained ids passes for what is trained, and fails for whatever is done to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_sft.commands.verify.contexts import check_contexts, problems_of
from lightning_sft.data.tokens.encode import encode
from lightning_sft.data.tokens.examples import Examples, to_record_batch
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.types import Conversation, Example, InputError, Message
from tests.conformance import CONVERSATIONS, conversation, templates, tokenizer_for
from tests.helpers.verifying import subject

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Nothing."},
]
ROW = Conversation(TURNS, weights=(0.0, 0.0, 1.0, 0.0, 2.0), provenance="a.jsonl:1")


def ones(example: Example, change: Callable[[list[float]], list[float]]) -> Example:
    return replace(example, target_weights=change(list(example.target_weights)))


def shifted(weights: list[float]) -> list[float]:
    return [0.0, *weights[:-1]]


def shifted_back(weights: list[float]) -> list[float]:
    return [*weights[1:], 0.0]


def without_the_stop(weights: list[float]) -> list[float]:
    return [w if w and following else 0.0 for w, following in zip(weights, [*weights[1:], 0.0], strict=True)]


def with_the_prompt(weights: list[float]) -> list[float]:
    return [0.0, *(w or 1.0 for w in weights[1:])]


def with_another_token(weights: list[float]) -> list[float]:
    return [0.0, 1.0, *weights[2:]]


def twice_as_heavy(weights: list[float]) -> list[float]:
    return [2 * weight for weight in weights]


def test_what_every_vendors_template_gives_passes() -> None:
    checked = 0
    for template in templates().values():
        tokenizer = tokenizer_for(template)
        for name in CONVERSATIONS:
            given = conversation(name, tokenizer)
            given = replace(given, weights=[float(m["role"] == "assistant") for m in given.messages])
            try:
                examples = encode(given, tokenizer, "sequence")
            except InputError:
                continue
            assert problems_of(given, examples, tokenizer, power=1.0) == [], (template[:40], name)
            checked += 1
    assert checked > 250


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "gemma", "phi3", "llama3_1", "glm4moe", "gptoss"])
def test_trained_turns_of_others_pass_and_no_other_ids_do(name: str) -> None:
    tokenizer = tokenizer_for(templates()[name])
    given = conversation("turns", tokenizer)
    turns: list[Message] = [{"role": "system", "content": "Be kind."}, *given.messages]
    for weights in ([1.0] * 5, [0.0, 0.0, 0.0, 1.0, 0.0]):
        row = replace(given, messages=turns, weights=weights)
        examples = encode(row, tokenizer, "sequence")
        assert problems_of(row, examples, tokenizer, power=1.0) == []
    [example] = examples
    assert problems_of(row, [ones(example, shifted_back)], tokenizer, power=1.0)
    assert problems_of(row, [ones(example, shifted)], tokenizer, power=1.0)
    ids = list(example.input_ids)
    assert problems_of(row, [replace(example, input_ids=[*ids[:2], 7, *ids[3:]])], tokenizer, power=1.0)


@pytest.mark.parametrize(
    "wrong", [shifted, shifted_back, without_the_stop, with_the_prompt, with_another_token, twice_as_heavy]
)
def test_a_wrong_mask_is_found(wrong: Any) -> None:
    tokenizer = tiny_tokenizer()
    [example] = encode(ROW, tokenizer)
    assert problems_of(ROW, [example], tokenizer) == []
    assert problems_of(ROW, [ones(example, wrong)], tokenizer)


def test_another_context_a_lost_answer_and_one_that_is_trained_twice_are_found() -> None:
    tokenizer = tiny_tokenizer()
    [example] = encode(ROW, tokenizer)
    ids = list(example.input_ids)
    assert "turn 3" in problems_of(ROW, [replace(example, input_ids=[ids[0], 7, *ids[2:]])], tokenizer)[0]
    assert "turn 3" in problems_of(ROW, [], tokenizer)[0]
    assert problems_of(ROW, [example, example], tokenizer)[0] == "turn 3: it is trained 2 times"
    assert (
        "the template renders" in problems_of(ROW, [replace(example, input_ids=[*ids[:-2], 5, ids[-1]])], tokenizer)[0]
    )


@pytest.mark.parametrize("overflow", ["drop", "truncate"])
def test_rows_that_were_cut_or_left_out_for_length_are_no_mistake(
    pretrained: str, tmp_path: Path, overflow: str
) -> None:
    row = {"messages": TURNS}
    long = {"messages": [*TURNS, {"role": "user", "content": "x" * 99}, {"role": "assistant", "content": "y" * 99}]}
    data = {"train": [row, long, row], "max_length": 200, "overflow": overflow}
    outcome = check_contexts(subject(pretrained, tmp_path, data))
    assert outcome.passed, outcome


def test_plain_texts_and_their_pieces_pass(pretrained: str, tmp_path: Path) -> None:
    data = {"train": [{"text": "a" * 50}, {"text": "b"}], "max_length": 20, "overflow": "split"}
    assert check_contexts(subject(pretrained, tmp_path, data)).passed


@pytest.mark.parametrize("settings", [{}, {"max_length": 5, "overflow": "truncate"}])
@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_token_ids_pass_as_they_are_and_no_others(
    pretrained: str, tmp_path: Path, normalize: str, settings: dict[str, Any]
) -> None:
    row = {"input_ids": [5, 6, 7, 8, 9, 10, 11], "loss_mask": [0, 0, 1, 1, 0, 0.5, 1]}
    given = subject(pretrained, tmp_path, {"train": [row, row], **settings}, normalize=normalize)
    assert check_contexts(given).passed
    split = given.data.splits["train"]
    for change in (shifted, twice_as_heavy):
        split.examples = Examples([to_record_batch([ones(example, change) for example in split.examples])])
        assert check_contexts(given).cases[0].measured == 2


def test_a_mixture_with_weights_and_repeated_names_passes(pretrained: str, tmp_path: Path, jsonl: Any) -> None:
    from lightning_sft.data.rows.mixture import Mixture, Part

    parts = {"a": Part([{"prompt": "x", "completion": "y"}], weight=0.5), "b": Part([{"q": "x", "a": "z"}])}
    parts["b"].columns = {"prompt": "q", "completion": "a"}
    outcome = check_contexts(subject(pretrained, tmp_path, {"train": Mixture(parts)}, normalize="sqrt"))
    assert outcome.passed
    assert outcome.cases[0].name == "train: 2 rows"


def test_the_failing_row_is_named_with_its_file_and_line(
    pretrained: str, tmp_path: Path, jsonl: Any, rows: list[Any]
) -> None:
    path = jsonl(rows)
    given = subject(pretrained, tmp_path, {"train": path, "val": path})
    split = given.data.splits["train"]
    wrong = [ones(e, shifted) if i == 4 else e for i, e in enumerate(split.examples)]
    split.examples = Examples([to_record_batch(wrong)])
    train, val = check_contexts(given).cases
    assert [failure.partition(": ")[0] for failure in train.failures] == [f"{path}:5"]
    assert (train.measured, val.measured, val.passed) == (1.0, 0.0, True)


def test_a_file_that_has_changed_since_does_not_pass(
    pretrained: str, tmp_path: Path, jsonl: Any, rows: list[Any]
) -> None:
    path = jsonl(rows)
    given = subject(pretrained, tmp_path, {"train": path})
    rows[2]["completion"] = "something else"
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]), encoding="utf-8")
    failures = check_contexts(given).cases[0].failures
    assert failures[0].startswith(f"{path}:3: turn 2")
    assert failures[1] == "1 row of data.train was not found when it was read again"


def test_of_many_rows_those_of_the_longest_and_shortest_sequences_are_among_the_chosen(
    pretrained: str, tmp_path: Path
) -> None:
    given = subject(pretrained, tmp_path, samples={"rows": 3})
    assert check_contexts(given).cases[0].name == "train: 3 of 12 rows"
