"""What the pages on troubleshooting and refused rows quote and name is there, and they quote every refusal of a row."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_sft.main import main
from lightning_sft.types import InputError
from tests.helpers.pages import ROOT, code, commands, is_key, options, page, tables, text_of, texts

SOURCE = ROOT / "lightning_sft"
REFUSED = page("reference/refused_rows.md")
PAGE = page("howto/troubleshooting.md") + REFUSED
ROWS = (
    *("rows/turns", "rows/calls", "rows/values", "rows/given_turns", "rows/messages", "rows/formats"),
    *("rows/dialects", "rows/other_data", "rows/token_rows", "rows/files", "rows/csv_files", "batches/split_plan"),
    *("tokens/encode", "tokens/chat_template", "tokens/generation_tags", "tokens/overflow"),
)


def quoted(text: str) -> list[str]:
    """The messages that tables quote in their first column."""
    rows = (row for head, *body in tables(text) if head[0] == "message" for row in body)
    return [re.sub("…+", "…", code(row[0])[0]) for row in rows]


def is_in(fragment: str, text: str) -> bool:
    """Whether a text of the source has the fragment; what is filled in may begin or end it."""
    return fragment.strip("… ") in text


def test_every_quoted_message_is_one_of_the_source() -> None:
    known = [text for path in SOURCE.rglob("*.py") for text in texts(path)]
    found = quoted(PAGE)
    assert len(found) > 80
    missing = [fragment for fragment in found if not any(is_in(fragment, text) for text in known)]
    assert not missing
    assert not is_in("the row has no question", "\n".join(known))  # so a fragment can be missing


def refusals() -> Iterator[str]:
    """The texts with which a row is refused; those that only add a place have no words."""
    for name in ROWS:
        for node in ast.walk(ast.parse((SOURCE / "data" / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "InputError":
                text = text_of(node.args[0])
                if len(re.findall(r"\w+", text)) > 2:
                    yield text


def test_every_refusal_of_a_row_is_on_the_page() -> None:
    found = quoted(REFUSED)
    left_out = [text for text in refusals() if not any(is_in(fragment, text) for fragment in found)]
    assert len(list(refusals())) > 45
    assert not left_out


def test_commands_have_the_verbs_and_flags_that_are_named() -> None:
    found = list(commands(PAGE))
    assert {verb for verb, _ in found} >= {"show", "doctor", "verify", "plan", "replay", "export", "fit"}
    for verb, flags in found:
        assert options(verb), verb
        assert set(flags) <= options(verb), (verb, set(flags) - options(verb))


def test_keys_named_are_those_of_fit() -> None:
    found = {
        match.partition("=")[0] for match in re.findall(r"(?<![-/\w])(?:data|model|trainer)\.(?!md\b)[\w.]*\w", PAGE)
    }
    assert len(found) > 25
    assert not {key for key in found if not is_key(key)}


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"question": "Hi", "answer": "Hello"}, "are of no known format"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "the row has no answer: no assistant turn"),
    ],
)
def test_a_row_that_is_refused_has_the_message_of_the_page(
    row: dict[str, object], fragment: str, pretrained: str, tmp_path: Path
) -> None:
    assert any(fragment in message for message in quoted(PAGE))
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    command = ["show", "--model.pretrained", pretrained, "--data.train", str(tmp_path / "train.jsonl")]
    with pytest.raises(InputError, match=".*".join(map(re.escape, fragment.split("…")))):
        main([*command, "--data.cache", "null"])
