"""Published chat templates, by name.

``python -m tests.oracle.templates FOLDER SOURCE ...`` puts the templates of source distributions and folders into a
folder, each text once (SOURCES.md).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

_OF_A_MODEL = ("chat_template", "tokenizer_config")  # files in the folder of a model
_NO_CHAT = re.compile(r"score|rerank|embed|ui/src|pooling|vlm2vec|asr")


@cache
def of_trl(training: bool = False) -> dict[str, str]:
    """The originals of vendors in trl's wheel; with ``training``, its own variants of them for training instead."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None, "pip install trl==1.16.0: its wheel carries the chat templates"
    [package] = spec.submodule_search_locations or []
    files = sorted((Path(package) / "chat_templates").glob("*.jinja"))
    return {f.stem: f.read_text(encoding="utf-8") for f in files if f.stem.endswith("_training") == training}


@cache
def published() -> dict[str, str]:
    """Templates in the folder that ``CHAT_TEMPLATES`` names, but those of trl; without a folder, none."""
    folder, known = os.environ.get("CHAT_TEMPLATES"), {text.strip() for text in of_trl().values()}
    files = sorted(Path(folder).glob("*.jinja")) if folder else []
    found = {file.stem: file.read_text(encoding="utf-8") for file in files}
    return {name: text for name, text in found.items() if text.strip() not in known}


def collect(folder: Path, sources: Sequence[str]) -> None:
    """Put the templates of sources into a folder, each text once."""
    folder.mkdir(parents=True, exist_ok=True)
    known: set[str] = set()
    for source in sources:
        for path, text in sorted(_texts(Path(source))):
            if text.strip() in known or _NO_CHAT.search(path):
                continue
            known.add(text.strip())
            name = Path(path).stem if Path(path).stem not in _OF_A_MODEL else Path(path).parent.name
            if (folder / f"{name}.jinja").exists():
                name += f"-{re.split(r'[-.]', Path(source).name)[0]}"
            (folder / f"{name}.jinja").write_text(text, encoding="utf-8")


def _texts(source: Path) -> Iterator[tuple[str, str]]:
    """Path and text of each template of a source distribution or a folder."""
    if source.is_dir():
        for file in source.rglob("*.jinja"):
            yield file.as_posix(), file.read_text(encoding="utf-8")
        for file in source.rglob("tokenizer_config.json"):
            found = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
            if isinstance(found, str):
                yield file.as_posix(), found
        return
    with tarfile.open(source) as archive:
        for member in archive.getmembers():
            content = archive.extractfile(member) if member.name.endswith(".jinja") else None
            if content is not None:
                yield member.name, content.read().decode()


if __name__ == "__main__":
    collect(Path(sys.argv[1]), sys.argv[2:])
