"""docs/notebooks: each is run from its source, and what is committed is what its source gives."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from lightning_sft.demos import tiny_pretrained
from tests.helpers.processes import ROOT

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("jupytext")
NOTEBOOKS = ROOT / "docs" / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.py"))
NOISE = re.compile(
    r"GPU available|TPU available|Tip:|UserWarning|FutureWarning|torchao|Seed set|Loading weights|site-packages"
    r"|LOAD REPORT|configuration_validator|IProgress|ipywidgets|LOCAL_RANK|Traceback"
)
MACHINE = re.compile(r"(?<!\w)/(?:work|tmp|root|home|usr)/")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that makes notebooks."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import notebooks

    return notebooks


def committed(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def outputs(book: Any) -> list[Any]:
    return [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]


def text(output: Any) -> str:
    data = output.get("data", {})
    return str(output.get("text") or data.get("text/html") or data.get("text/plain", ""))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_the_cells_of_its_source_and_has_been_run(name: str, made: Any) -> None:
    book = committed(name)
    cells = [(cell.cell_type, cell.source) for cell in book.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in made.without_outputs(NOTEBOOKS / f"{name}.py").cells]
    run = [cell.execution_count for cell in book.cells if cell.cell_type == "code" and not cell.metadata.get("tags")]
    assert run == list(range(1, len(run) + 1))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_say_nothing_of_other_packages_or_of_the_machine(name: str) -> None:
    for output in outputs(committed(name)):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", text(output)
        assert not NOISE.search(text(output)), text(output)
        assert not MACHINE.search(text(output)), text(output)
        assert "\x1b" not in str(output.get("text", "")), text(output)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_links_to_itself_in_the_repository_of_the_project(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Repository"].removeprefix("https://github.com/")
    title, install = committed(name).cells[0].source, committed(name).cells[1].source
    assert f"https://colab.research.google.com/github/{repository}/blob/main/docs/notebooks/{name}.ipynb" in title
    assert "https://lightning.ai/new?repo_url=https%3A%2F%2Fgithub.com%2F" in title
    assert install == f'%pip install -q "{project["name"]}[notebooks]"'


def test_the_page_of_notebooks_has_them_all() -> None:
    page = (NOTEBOOKS / "index.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\((\w+)\.ipynb\)", page)) == NAMES


def test_outputs_are_kept_for_other_text_and_not_for_other_code(made: Any) -> None:
    cells = [nbformat.v4.new_markdown_cell("A"), nbformat.v4.new_code_cell("1", execution_count=1)]
    before = nbformat.v4.new_notebook(cells=cells)
    text = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("B"), nbformat.v4.new_code_cell("1")])
    assert made.with_outputs_of(text, before).cells[1].execution_count == 1
    code = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("A"), nbformat.v4.new_code_cell("2")])
    with pytest.raises(ValueError, match="run it again"):
        made.with_outputs_of(code, before)


def test_a_module_that_divides_by_the_normalizer_undoes_all_that_lightning_divides_by() -> None:
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".py")]
    lines = re.findall(r"^ *return .*/ batch.normalizer.*", "\n".join(pages), re.MULTILINE)
    assert len(lines) > 1
    assert all(re.search(r"accumulate.* \* (num_ranks|self.trainer.world_size) ", line) for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_with_a_tiny_model_in_place_of_the_demo_model(name: str, made: Any, tmp_path: Path) -> None:
    tiny_pretrained(tmp_path / "SmolLM2", max_position_embeddings=2048)
    book = made.run(made.without_outputs(NOTEBOOKS / f"{name}.py"), tmp_path, timeout=540)
    assert not [output for output in outputs(book) if output.output_type == "error" or output.get("name") == "stderr"]
