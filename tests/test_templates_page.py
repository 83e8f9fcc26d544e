"""The page on chat templates: each example trains what the page says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from lightning_sft.data.rows.messages import Converter, Reading
from lightning_sft.data.tokens.encode import encode
from lightning_sft.data.tokens.template_config import TemplateConfig
from tests.conformance import templates, tokenizer_for
from tests.helpers.pages import blocks, is_key, page

EXAMPLES = page("reference/chat_templates.md").split("<!-- template: ")[1:]


def trained(row: dict[str, Any], template: str, settings: dict[str, Any]) -> list[str]:
    """Each stretch of trained tokens of a row, as text."""
    tokenizer = tokenizer_for(templates()[template])
    variables, thoughts = settings.pop("chat_template_kwargs", {}), settings.pop("thoughts", "keep")
    conversation = Converter(Reading(**settings))(row, "f:1")
    found = []
    for example in encode(conversation, tokenizer, config=TemplateConfig(variables, thoughts=thoughts)):
        run: list[int] = []
        for token, weight in zip(example.input_ids, example.target_weights, strict=True):
            if weight > 0:
                run.append(int(token))
            elif run:
                found.append(tokenizer.decode(run))
                run = []
        found.append(tokenizer.decode(run))
    return [text.replace("\n", "\\n") for text in found]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_each_example_trains_what_the_page_says(number: int) -> None:
    text = EXAMPLES[number]
    name = text.split(maxsplit=1)[0]
    settings = next((yaml.safe_load(block)["data"] for block in blocks(text, "yaml")), {})
    assert all(is_key(f"data.{key}") for key in settings)
    rows, expected = blocks(text, "json")[0], blocks(text, "text")[0]
    found = [one for line in rows.splitlines() for one in trained(json.loads(line), name, dict(settings))]
    assert found == expected.splitlines()


def test_there_are_examples_of_many_templates() -> None:
    assert len({text.split(maxsplit=1)[0] for text in EXAMPLES}) > 8
