"""The pages on concepts: what they tell a reader to run is run, and every key that they name is real."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from lightning_sft.main import VERBS, main
from lightning_sft.types import Normalize
from tests.helpers.pages import is_key
from tests.helpers.reading import Reader

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {
    path.stem: path
    for path in (
        DOCS / "concepts" / "objective.md",
        DOCS / "concepts" / "packing.md",
        DOCS / "concepts" / "security.md",
        DOCS / "howto" / "performance.md",
        DOCS / "reference" / "cli.md",
        DOCS / "reference" / "limits.md",
    )
}


def of_class(key: str) -> str:
    """Arguments of a class may stand beside its name, as flags do."""
    return key.replace("trainer.strategy.", "trainer.strategy.init_args.")


def without_directives(page: Path) -> Path:
    """The page without what Sphinx puts in, in a file of its own; its lines keep their numbers."""
    text = page.read_text(encoding="utf-8")
    directive = re.compile(r"^```(?:\{|math\b).*?^```$", re.DOTALL | re.MULTILINE)
    plain = directive.sub(lambda found: "\n" * found[0].count("\n"), text)
    Path(page.name).write_text(plain, encoding="utf-8")
    return Path(page.name)


@pytest.mark.parametrize("name", PAGES)
def test_every_block_of_a_page_does_what_the_page_says(
    name: str,
    pretrained: str,
    jsonl: Any,
    rows: list[dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("SmolLM2").symlink_to(pretrained)
    for file in ("train.jsonl", "val.jsonl"):
        jsonl(rows, file)
    Path("fit.yaml").write_text("{model: {pretrained: SmolLM2}, data: {train: train.jsonl}}")
    Path("foreign.yaml").write_text("{model: {class_path: somebody.Module}}")
    elsewhere = {"lightning-sft doctor\n": ""}  # takes seconds; test_doctor runs it
    Reader(capsys, elsewhere).read(without_directives(PAGES[name]))


@pytest.mark.parametrize("name", PAGES)
def test_every_key_of_a_page_is_one_of_fit(name: str) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|\(.*?\.md.*?\)", "", text, flags=re.DOTALL)  # blocks are run
    named = re.findall(r"(?<![\w/.])(?:model|data|trainer)\.[a-z_]+(?:\.[a-z_]+)*", prose)
    unknown = {key for key in named if not key.endswith(".py") and not is_key(of_class(key))}
    assert not unknown


def test_flags_that_cannot_be_read_end_with_the_code_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGES["cli"].read_text(encoding="utf-8")
    [code] = re.findall(r"^\| (\d+) \| flags that cannot be read", page, re.MULTILINE)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--no.such.key", "1"])
    assert stop.value.code == int(code)


def test_the_table_of_normalization_is_that_of_the_code() -> None:
    page = PAGES["objective"].read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == get_args(Normalize)


def test_the_table_of_verbs_has_all_of_them() -> None:
    page = PAGES["cli"].read_text(encoding="utf-8")
    named = {
        verb for cell in re.findall(r"^\| (`.+?`) \|", page, re.MULTILINE) for verb in re.findall(r"`([^`]+)`", cell)
    }
    assert named >= VERBS.keys()
