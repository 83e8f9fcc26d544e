"""The page on rows: each example is read, and becomes what the page says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from lightning_sft.data.rows.dialects import KEYS, ROLES
from lightning_sft.data.rows.formats import FORMATS, FormatName
from lightning_sft.data.rows.messages import Converter, Reading
from lightning_sft.types import Conversation, InputError
from tests.helpers.pages import blocks, code, is_key, page, tables
from tests.real_files import table

PAGE = page("reference/rows.md")
SECTIONS = {text.partition("\n")[0]: text for text in PAGE.split("\n## ")[1:]}
IN_ROWS = ("columns", "system", "roles", "message_keys")


def rows_of(block: str) -> list[Any]:
    return [json.loads(line) for line in block.splitlines()]


def sections() -> Iterator[tuple[str, list[Any], list[Any], dict[str, Any]]]:
    """Each section with examples: its rows, what they become where it says so, and the settings that they need."""
    for title, text in SECTIONS.items():
        if found := blocks(text, "json"):
            assert len(found) <= 2, title
            own = [yaml.safe_load(block)["data"] for block in blocks(text, "yaml")]
            yield title, rows_of(found[0]), rows_of(found[1]) if len(found) > 1 else [], own[0] if own else {}


TABLES = list(tables(PAGE))[:3]  # the fourth is of published files
_, ROLE_ROWS, _ = (body for _, *body in TABLES)
EXAMPLES = {title: rest for title, *rest in sections()}


@pytest.mark.parametrize("title", EXAMPLES)
def test_each_example_becomes_what_the_page_says(title: str) -> None:
    rows, become, settings = EXAMPLES[title]
    reading = Reading(**{key: value for key, value in settings.items() if key in IN_ROWS})
    read = [Converter(reading).read(row, "f:1") for row in rows]
    assert all(any(each.weights if isinstance(each, Conversation) else each.target_weights) for each in read)
    assert not become or read == [Converter().read(row, "f:1") for row in become]


@pytest.mark.parametrize("title", [title for title, (_, _, settings) in EXAMPLES.items() if settings])
def test_settings_of_an_example_are_keys_of_fit_and_are_needed(title: str) -> None:
    rows, become, settings = EXAMPLES[title]
    assert all(is_key(f"data.{key}") for key in settings)
    for row, other in zip(rows, become, strict=True):
        try:
            without = Converter().read(row, "f:1")
        except InputError:
            continue
        assert without != Converter().read(other, "f:1")


def test_every_format_and_every_name_is_on_the_page() -> None:
    formats, roles, keys = ([[code(cell) for cell in row] for row in body] for _, *body in TABLES)
    assert [name for [name], *_ in formats] == list(get_args(FormatName))
    for [name], found, _ in formats:
        assert {FORMATS[name].question, *FORMATS[name].answers} <= {*found, *code(SECTIONS["Token ids"])}
    assert {alias: role for (role, _), (_, names) in zip(ROLE_ROWS, roles, strict=True) for alias in names} == ROLES
    assert [tuple(row[1]) for row in keys] == [KEYS[key] for key in ("role", "content", "reasoning_content")]
    assert all(f"`{name}`" in PAGE for name in KEYS["loss_weight"])


@pytest.mark.slow
@pytest.mark.skipif("REAL_FILES" not in os.environ, reason="REAL_FILES names no folder with the published files")
def test_published_files_become_what_the_page_says() -> None:
    assert PAGE.endswith(table(Path(os.environ["REAL_FILES"]))), "run: python -m tests.real_files FOLDER"
