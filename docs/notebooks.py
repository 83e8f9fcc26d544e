"""The notebooks of these pages, run anew from their sources: ``python docs/notebooks.py [NAME ...]``.

``docs/notebooks/NAME.py`` is what is edited, cells between lines ``# %%`` as editors and jupytext read them. It is run
in an empty folder, and written to ``NAME.ipynb`` with its outputs, links that open it elsewhere, and a cell that
installs the library. With ``--text``, text alone is renewed, where no code has changed since.
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
COLORS = re.compile(r"\x1b\[[0-9;]*m")
INSTALL = '%pip install -q "lightning-sft[notebooks]"'
SETTINGS = {
    "COLUMNS": "100",  # of what commands print
    "TQDM_DELAY": "3600",  # bars are for whoever waits
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
    studio = f"https://lightning.ai/new?repo_url={quote(file, safe='')}"
    return f"Open it in [Colab]({colab}) or in a [Lightning Studio]({studio})."


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


def run(book: NotebookNode, folder: Path, timeout: int = 3600) -> NotebookNode:
    """Run all cells in `folder`, and leave what they print in the notebook.

    Raises:
        CellExecutionError: A cell failed; with its traceback.
    """
    os.environ.update(SETTINGS, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(book, timeout=timeout, resources=place, record_timing=False, coalesce_streams=True).execute()
    book.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [without_colors(output) for output in cell.outputs if not is_empty(output)]
    return book


def link_demo_model(folder: Path) -> None:
    """Lay the demo model into `folder` where it has been fetched before."""
    fetched = (
        Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lightning-sft" / "SmolLM2-135M-Instruct"
    )
    if (fetched / "config.json").is_file():
        (folder / "SmolLM2").symlink_to(fetched)


def with_outputs_of(book: NotebookNode, before: NotebookNode) -> NotebookNode:
    """The notebook with the outputs of one that has the same code.

    Raises:
        ValueError: Their code is different.
    """
    new, old = ([cell for cell in one.cells if cell.cell_type == "code"] for one in (book, before))
    if [cell.source for cell in new] != [cell.source for cell in old]:
        raise ValueError("The code has changed since the notebook was run: run it again.")
    for cell, run_before in zip(new, old, strict=True):
        cell.outputs, cell.execution_count = run_before.outputs, run_before.execution_count
    return book


def without_colors(output: NotebookNode) -> NotebookNode:
    """An output without the colors that Jupyter asks all commands for, and pages show as text."""
    if "text" in output:
        output.text = COLORS.sub("", output.text)
    return output


def is_empty(output: NotebookNode) -> bool:
    """Whether an output is what rich leaves of a bar that has gone."""
    return output.output_type == "display_data" and not output.data.get("text/plain", "").strip()


def main() -> None:
    """Run the notebooks that the command line names, or all."""
    names = sorted(path.stem for path in NOTEBOOKS.glob("*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"Notebooks; by default all: {', '.join(names)}.")
    parser.add_argument("--text", action="store_true", help="Renew the text, and keep the outputs.")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(names):
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    for name in arguments.names or names:
        book, target = without_outputs(NOTEBOOKS / f"{name}.py"), NOTEBOOKS / f"{name}.ipynb"
        if arguments.text:
            book = with_outputs_of(book, nbformat.read(target, as_version=4))
        else:
            with tempfile.TemporaryDirectory() as folder:
                link_demo_model(Path(folder))
                book = run(book, Path(folder))
        nbformat.write(book, target)
        print(target.relative_to(ROOT))


if __name__ == "__main__":
    main()
