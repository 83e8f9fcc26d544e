"""Names that users have written into YAML files and programs stay, and new ones are added on purpose."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.pinned import with_pinned
from tests.helpers.public_names import names


@with_pinned("jsonargparse", "lightning")  # whose options are among ours
def test_public_names_are_those_that_were_released() -> None:
    released = (Path(__file__).parent / "public_names.txt").read_text(encoding="utf-8").splitlines()
    assert names() == released  # the docstring of tests/helpers/public_names.py says how to change them
