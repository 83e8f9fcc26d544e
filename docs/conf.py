"""Sphinx builds these pages: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

DOCS = Path(__file__).parent.resolve()
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import links  # noqa: E402 - it is found by the path above
from inventories import write_inventories  # noqa: E402 - the same

from lightning_sft import __version__ as release  # noqa: E402 - the same

repository = ""  # address that links to files outside of docs/ have, as https://github.com/OWNER/NAME/blob/main

project = "lightning_sft"
author = copyright = "the authors of lightning_sft"  # noqa: A001 - Sphinx calls it so
extensions = [
    "myst_nb",  # pages and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
nitpicky = True  # names that lead nowhere are errors
nitpick_ignore_regex = [  # ranges, names of annotations, and classes that pages do not show
    ("py:class", r"[<>]=? .*|Path|Optimizer|ArgsType|Context|Routers|Place|.*\.(Address|Packs)"),
    ("py:class", r"that is .*|such as .*|[0-9]+[KMGT]B"),  # forms of strings
    ("py:class", r".*\.(TargetLosses|FirstChecks|LimitedModule|OurNames|OwnSteps|SettledArguments|TrainedData)"),
    ("py:class", r".*\.(LRScheduler|ReduceLROnPlateau)"),
]
suppress_warnings = ["misc.highlighting_failure"]  # cells of bash in a notebook of Python
intersphinx_mapping = write_inventories(DOCS.parent / "build" / "inventories")

html_theme = "furo"
html_title = f"lightning_sft {release}"
html_static_path, html_css_files = ["_static"], ["pages.css"]
html_show_copyright = html_show_sphinx = False
highlight_language = "text"  # of blocks that do not say
viewcode_follow_imported_members = False  # else it lists a page for built-in types, which it does not write
nb_execution_mode = "off"  # notebooks have their outputs: docs/notebooks.py
myst_heading_anchors = 3
myst_fence_as_directive = ["math"]  # formulas as GitHub has them
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"  # in the list of arguments, since docstrings have no types
autodoc_typehints_description_target = "documented"
maximum_signature_line_length = 90
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True


def formula(writer: Any, node: Any) -> None:
    """Write a formula as MathML, which browsers lay out without a script."""
    writer.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


def setup(app: Any) -> None:
    """Have links rewritten, names looked up, and formulas written."""
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.add_config_value("repository", "", "env", str)
    app.connect("source-read", links.on_page)
    app.connect("include-read", links.on_include)
    app.connect("missing-reference", links.of_bare_name)
