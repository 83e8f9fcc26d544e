"""The page on chat templates: its examples give what it says."""

from __future__ import annotations

import doctest
import re

from tests.helpers.pages import blocks, code, is_key, page

PAGE = page("templates.md")


def test_each_example_gives_what_the_page_says() -> None:
    scope: dict[str, object] = {}
    found = blocks(PAGE, "python")
    assert len(found) > 6
    for number, block in enumerate(found):
        example = doctest.DocTestParser().get_doctest(block, scope, f"block {number}", "templates.md", 0)
        runner = doctest.DocTestRunner(verbose=False)
        runner.run(example, clear_globs=False)
        scope = example.globs
        assert runner.failures == 0, block


def test_keys_are_those_of_fit() -> None:
    text = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    keys = [name.partition(":")[0] for name in code(text) if name.startswith("data.")]
    assert len(keys) > 4
    assert all(map(is_key, keys))
