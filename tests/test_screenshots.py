"""Pictures of the documentation: a script makes them all, they load nothing, are small, and are shown with a text."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.helpers.browsing import chromedriver
from tests.helpers.processes import ROOT, run

IMAGES = ROOT / "docs" / "images"
OTHERS = {"data_path.svg", "precision.png"}  # drawn by hand, and by benchmarks.precision


def test_pictures_are_small_load_nothing_and_are_shown_with_a_text() -> None:
    pictures = sorted(IMAGES.iterdir())
    assert pictures
    assert all(path.stat().st_size < 200_000 for path in pictures)
    assert sum(path.stat().st_size for path in pictures) < 1_000_000
    for path in pictures:
        if path.suffix == ".svg":
            assert not re.search(r"url\((?!#)|href=", path.read_text(encoding="utf-8")), path.name
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    shown = dict(re.findall(r"!\[([^\]]{20,})\]\((?:\.\./)?images/([^)]+)\)", text))
    assert set(shown.values()) == {path.name for path in pictures}


@pytest.mark.slow
def test_the_script_makes_every_picture(pretrained: str, tmp_path: Path) -> None:
    chromedriver()
    command = [sys.executable, "docs/screenshots.py", "--model", pretrained, "--out", str(tmp_path), "--rows", "40"]
    run(command, timeout=500)
    made = {path.name for path in tmp_path.iterdir()}
    assert len(made) == 9
    assert made | OTHERS >= {path.name for path in IMAGES.iterdir()}
    for path in tmp_path.glob("*.svg"):
        assert len("".join(ElementTree.parse(path).getroot().itertext())) > 500, path.name
    for path in tmp_path.glob("*.png"):
        assert path.stat().st_size > 20_000, path.name
