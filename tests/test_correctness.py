"""The scoreboard of correctness: it tells right from wrong, and our own column is what it says on a tiny scale."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from benchmarks.correctness.__main__ import PAGE, main
from benchmarks.correctness.masks import verdicts
from benchmarks.correctness.page import draw, markdown, rewritten
from benchmarks.correctness.rows import DIALECTS, conversations, lines
from benchmarks.record import each_or_error
from lightning_sft.data.rows.messages import Converter, Reading
from lightning_sft.data.tokens.encode import encode_all
from lightning_sft.types import IGNORE, Conversation
from tests.oracle.templates import of_trl
from tests.oracle.vocabularies import tokenizer_for


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_for(of_trl()["qwen3"])


def sequences(tokenizer: PreTrainedTokenizerFast, found: list[Conversation]) -> list[list[dict[str, list[int]]]]:
    return [
        [
            {
                "input_ids": list(example.input_ids),
                "labels": [
                    token if weight else IGNORE
                    for token, weight in zip(example.input_ids, example.target_weights, strict=True)
                ],
            }
            for example in encoded.examples
        ]
        for encoded in encode_all(found, tokenizer)
    ]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_row_says_what_its_conversation_says(dialect: str) -> None:
    found = conversations(dialect, 20, seed=0)
    convert = Converter(Reading())
    for line, conversation in zip(lines(dialect, found).splitlines(), found, strict=True):
        read = convert(json.loads(line), "a:1")
        contents = [(message["role"], message["content"]) for message in read.messages]
        assert contents == [(message["role"], message["content"]) for message in conversation.messages]
        assert read.tools == conversation.tools


@pytest.mark.parametrize("dialect", DIALECTS)
def test_right_rows_are_right_and_a_label_more_or_less_is_wrong(
    tokenizer: PreTrainedTokenizerFast, dialect: str
) -> None:
    found = conversations(dialect, 4, seed=0)
    rows: list[Any] = sequences(tokenizer, found)
    assert {verdict for verdict, _ in verdicts(tokenizer, found, rows)} == {"right"}
    for row in rows:
        row[-1]["labels"][-1] = IGNORE if row[-1]["labels"][-1] != IGNORE else row[-1]["input_ids"][-1]
        row[-1]["labels"][1] = row[-1]["input_ids"][1]
    rows[0] = "an error"
    assert [verdict for verdict, _ in verdicts(tokenizer, found, rows)] == ["refused", "wrong", "wrong", "wrong"]


def test_a_line_end_that_is_trained_behind_the_stop_changes_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    found = conversations("alpaca", 1, seed=0)
    [[sequence]] = rows = sequences(tokenizer, found)
    [line_end] = tokenizer("\n", add_special_tokens=False).input_ids
    for ids in sequence.values():
        ids.append(line_end)
    assert verdicts(tokenizer, found, rows) == [("right", "")]


def test_a_line_end_of_the_generation_prompt_may_be_trained_and_its_role_may_not(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    found = conversations("messages", 1, seed=0)
    for blanks, verdict in ((1, "right"), (2, "wrong")):
        rows = sequences(tokenizer, found)
        labels, ids = rows[0][0]["labels"], rows[0][0]["input_ids"]
        first = next(n for n, label in enumerate(labels) if label != IGNORE)
        labels[first - blanks : first] = ids[first - blanks : first]
        assert [said for said, _ in verdicts(tokenizer, found, rows)] == [verdict]


def test_rows_that_fail_together_are_tried_one_by_one() -> None:
    def encode(rows: list[dict[str, Any]]) -> list[Any]:
        if any(row["bad"] for row in rows):
            raise ValueError("bad")
        return [row["bad"] for row in rows]

    assert each_or_error(encode, [{"bad": 0}, {"bad": 1}, {"bad": 0}]) == [0, "ValueError: bad", 0]
    assert each_or_error(encode, [{"bad": 1}] * 2) == ["ValueError: bad"] * 2
    assert each_or_error(lambda rows: rows[1:], [{"bad": 0}, {"bad": 1}]) == ["left out"] * 2


def test_the_page_has_every_system_with_its_figures(tmp_path: Path) -> None:
    own = {dialect: {"right": 3, "wrong": 1, "reasons": [["turn 2: no `stop`", 1]]} for dialect in DIALECTS}
    results = {
        "settings": {"rows": 4},
        "missing": {"litgpt": "no wheel"},
        "targets": {"qwen3": {"ours": own, "trl": own}},
    }
    results |= {"step": {"ours": {"share": 1e-7, "unlike": 3}}, "resumed": {"ours": {"share": 0.0, "unlike": 0}}}
    text = markdown(results)
    assert "| lightning_sft | 3 (1, 0) | 3 (1, 0) | 3 (1, 0) | 3 (1, 0) | 3 (1, 0) | 75.0% |" in text
    assert "| lightning_sft | 1.0e-07 | the same bit for bit |" in text
    assert "LitGPT could not be installed: no wheel" in text
    draw(results, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_the_published_page_is_written_from_its_results() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert rewritten(text, json.loads(PAGE.with_suffix(".json").read_text(encoding="utf-8"))) == text
    assert "|\n\n![" in text  # a picture right below a table would be one of its rows


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_our_rows_are_right_our_split_step_is_the_same_and_a_killed_run_resumes(
    tmp_path: Path,
) -> None:
    small = ["--systems", "ours", "--rows", "5", "--templates", "qwen3"]
    results = main([*small, "--out", str(tmp_path), "--python", sys.executable])
    assert all(own["right"] == 5 for own in results["targets"]["qwen3"]["ours"].values())
    assert results["step"]["ours"]["share"] < 1e-5
    assert results["resumed"]["ours"]["unlike"] == 0
