"""The built documentation: every page and public name has its place, and Sphinx finds nothing to complain of."""

from __future__ import annotations

import re
import sys
from html import unescape
from pathlib import Path

import pytest

import lightning_sft
from lightning_sft import callbacks
from tests.helpers.processes import ROOT, run

DOCS = ROOT / "docs"


def words(page: Path) -> str:
    """The text of a page."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8"))).split())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx")
    out = tmp_path_factory.mktemp("docs")
    run([sys.executable, "-m", "sphinx", "-W", "--keep-going", str(DOCS), str(out)], timeout=540)
    return out


def test_every_public_name_is_in_the_reference() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("reference/api/*.rst"))
    documented = set(re.findall(r"^\.\. auto\w+:: ([\w.]+)", pages, re.MULTILINE))
    names = {f"lightning_sft.{name}" for name in lightning_sft.__all__ if name != "__version__"}
    assert names | {f"lightning_sft.callbacks.{name}" for name in callbacks.__all__} <= documented


def test_every_page_is_in_the_contents_of_its_folder() -> None:
    for index in DOCS.rglob("index.md"):
        listed = set(re.findall(r"^[\w/*]+$", index.read_text(encoding="utf-8"), re.MULTILINE))
        pages = {page.stem for page in index.parent.glob("*.md")} - {"index"}
        folders = {f"{inner.parent.name}/index" for inner in index.parent.glob("*/index.*")}
        assert folders <= listed, index
        assert "*" in listed or pages <= listed, index


@pytest.mark.slow
def test_the_module_is_documented_with_its_arguments(built: Path) -> None:
    text = words(built / "reference" / "api" / "train.html")
    assert "pretrained ( Name | Path ) – A hub name, a folder, or a GGUF file." in text
    assert "neftune_alpha" in text
    page = (built / "reference" / "api" / "train.html").read_text(encoding="utf-8")
    assert 'id="lightning_sft.SFTModule"' in page
    assert "https://lightning.ai/docs/pytorch/stable/api/lightning.pytorch.core.LightningModule.html" in page


@pytest.mark.slow
def test_code_on_the_page_of_the_objective_is_that_of_the_package(built: Path) -> None:
    assert "of_z = exps . mul_" in words(built / "concepts" / "objective.html")


@pytest.mark.slow
def test_every_link_within_the_pages_leads_somewhere(built: Path) -> None:
    pages = {page: page.read_text(encoding="utf-8") for page in built.rglob("*.html")}
    assert len(pages) > 30
    for page, text in pages.items():
        for target in re.findall(r'(?:href|src)="([^"#?:]+)["#?]', text):
            assert (page.parent / unescape(target)).exists(), f"{page.name} links to {target}"


@pytest.mark.slow
def test_links_out_of_the_documentation_are_files_to_download(built: Path) -> None:
    page = (built / "concepts" / "objective.html").read_text(encoding="utf-8")
    assert re.search(r'_downloads/\w+/test_objective\.py"', page)


def test_with_an_address_links_go_to_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    from links import rewritten

    text = "[a](../configs) [b](../tests/test_main.py) [c](howto/show.md#check) [d](https://x.org) `[e](nowhere.md)`"
    page = DOCS / "index.md"
    assert rewritten(text, DOCS, page, "") == text.replace("[a](../configs)", "a")
    there = text.replace("../configs", "https://x/configs").replace("../tests", "https://x/tests")
    assert rewritten(text, DOCS, page, "https://x") == there
    assert rewritten("[c](docs/howto/show.md#check)", ROOT, page, "") == "[c](howto/show.md#check)"
