"""Prints, as constraints, the lowest release that pyproject.toml allows of each package; see `make test-lowest`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"].values()
for requirement in sorted({*project["dependencies"], *(one for extra in extras for one in extra)}):
    if found := re.match(r"([\w-]+)(?:\[[\w,-]*\])?\s*>=\s*([\w.]+)", requirement):
        print("==".join(found.groups()))
