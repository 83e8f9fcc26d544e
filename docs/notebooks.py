"""The notebooks of these pages, run anew from their sources: ``python docs/notebooks.py [NAME ...]``.

``docs/notebooks/NAME.py`` is what is edited, cells between lines ``# %%`` as editors and jupytext read them. It is run in an
empty folder, and written to ``NAME.ipynb`` with its outputs, links that open it elsewhere, and a cell that installs the library.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import tomllib
from pathlib import Path
from urllib.parse import quote

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "docs" / "notebooks"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
INSTALL = '%pip install -q "lightning-sft[notebooks]"'
SETTINGS = {
    "COLUMNS": "100",  # of what commands print
    "JUPYTER_COLUMNS": "100",  # of what rich prints in a cell
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": 'ignore:IProgress not found,ignore:install "ipywidgets"',  # a saved notebook cannot show them
}


def links(name: str) -> str:
    """A line with the addresses under which others open the notebook."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Repository"]
    file = f"{repository}/blob/main/docs/notebooks/{name}.ipynb"
    colab = file.replace("https://github.com", "https://colab.research.google.com/github")
    return f"Open it in [Colab]({colab}) or in a [Lightning Studio](https://lightning.ai/new?repo_url={quote(file, safe='')})."


def without_outputs(source: Path) -> NotebookNode:
    """The notebook of a source before it has been run: the links below its title, then a cell that is not run here."""
    book = jupytext.read(source, fmt="py:percent")
    title, _, rest = book.cells[0].source.partition("\n")
    book.cells[0].source = f"{title}\n\n{links(source.stem)}\n{rest}"
    book.cells.insert(1, nbformat.v4.new_code_cell(INSTALL, metadata={"tags": ["skip-execution"]}))
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number}"
    book.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    book.nbformat, book.nbformat_minor = 4, 5
    return book


def run(book: NotebookNode, folder: Path, timeout: int = 900) -> NotebookNode:
    """Run all cells in `folder`, and leave what they print in the notebook.

    Raises:
        CellExecutionError: A cell failed; with its traceback.
    """
    os.environ.update(SETTINGS, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    client = NotebookClient(book, timeout=timeout, resources={"metadata": {"path": str(folder)}}, record_timing=False)
    client.execute()
    book.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [settled(output) for output in cell.outputs if not is_empty(output)]
    return book


def is_empty(output: NotebookNode) -> bool:
    """Whether an output is what rich leaves of a bar that has gone."""
    return output.output_type == "display_data" and not output.data.get("text/plain", "").strip()


def settled(output: NotebookNode) -> NotebookNode:
    """An output as it is left, where lines are printed over each other."""
    if output.output_type == "stream":
        output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
    return output


def main() -> None:
    """Run the notebooks that the command line names, or all."""
    names = sorted(path.stem for path in NOTEBOOKS.glob("*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*names, []], default=names)
    for name in parser.parse_args().names:
        with tempfile.TemporaryDirectory() as folder:
            book = run(without_outputs(NOTEBOOKS / f"{name}.py"), Path(folder))
        nbformat.write(book, NOTEBOOKS / f"{name}.ipynb")
        print(f"docs/notebooks/{name}.ipynb")


if __name__ == "__main__":
    main()
