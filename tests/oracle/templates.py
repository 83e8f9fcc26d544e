"""Published chat templates, by name."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


def of_trl(training: bool = False) -> dict[str, str]:
    """The originals of vendors in trl's wheel; with ``training``, its own variants of them for training instead."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None, "pip install trl==1.16.0: its wheel carries the chat templates"
    [package] = spec.submodule_search_locations or []
    files = sorted((Path(package) / "chat_templates").glob("*.jinja"))
    return {f.stem: f.read_text(encoding="utf-8") for f in files if f.stem.endswith("_training") == training}


def published() -> dict[str, str]:
    """Templates in the folder that ``CHAT_TEMPLATES`` names, each text once; without a folder, none."""
    folder = os.environ.get("CHAT_TEMPLATES")
    known = set(of_trl().values())
    found = {}
    for file in sorted(Path(folder).rglob("*.jinja")) if folder else ():
        text = file.read_text(encoding="utf-8")
        if text.strip() not in known:
            known.add(text.strip())
            found[file.stem] = text
    return found
