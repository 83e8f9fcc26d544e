"""Runs of architectures in processes of their own, and the page of what they show."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.architectures.configs import ARCHITECTURES
from tests.helpers.pages import tables
from tests.helpers.processes import ROOT, fork, torchrun

Row = dict[str, str]
PAGE = ROOT / "docs" / "reference" / "models.md"
ALONE = ("loads", "packs", "attention", "gradient", "checkpointing", "LoRA", "export")
COLUMNS = ("loads", "packs", "attention", "gradient", "checkpointing", "ddp", "fsdp2", "LoRA", "export")
TIMEOUT = 300  # seconds until a process counts as hanging


def measured(model_type: str) -> Row:
    """The outcome of each column of an architecture; a process that crashes or hangs is the outcome of what it left."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        row = dict.fromkeys(ALONE, _ran(fork, model_type, folder)) | _found(folder / "alone.json")
        left = ["ddp", "fsdp2"] if (folder / "step.pt").exists() else []  # what two processes have to arrive at
        while left:
            ended = _ran(torchrun, model_type, folder, *left)
            row |= {left[0]: ended} | _found(folder / "together.json")
            left = [strategy for strategy in left if strategy not in row]
    return {column: row.get(column, "–") for column in COLUMNS}


def all_measured(model_types: Iterable[str], at_once: int = 2) -> Iterator[tuple[str, Row]]:
    """The rows of several architectures, in order, so many at a time."""
    names = list(model_types)
    with ThreadPoolExecutor(at_once) as threads:
        yield from zip(names, threads.map(measured, names), strict=True)


def outcome(cell: str) -> str:
    """A cell without the size of a rounding error, which differs between processors."""
    return re.sub(r" \d+e[-+]\d+$", "", cell)


def written(text: str) -> dict[str, Row]:
    """The rows on a page, by model type."""
    found: dict[str, Row] = {}
    for head, *rows in tables(text):
        if head[1:] == list(COLUMNS):
            found |= {row[0].strip("`"): dict(zip(COLUMNS, row[1:], strict=True)) for row in rows}
    return found


def page(text: str, rows: dict[str, Row]) -> str:
    """The page with other tables, one below each heading of a group, and the releases that they are made with."""
    preface = re.sub(
        r"(?m)^Measured on a CPU with .*$", f"Measured on a CPU with {versions()}.", text.partition("\n## ")[0]
    )
    parts = [preface.rstrip() + "\n"]
    for title, group in ARCHITECTURES.items():
        lines = [f"| {' | '.join(['model type', *COLUMNS])} |", "|---" * (len(COLUMNS) + 1) + "|"]
        lines += [f"| `{name}` | {' | '.join(rows[name].values())} |" for name in group if name in rows]
        parts.append(f"## {title.capitalize()}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def versions() -> str:
    """The releases that a table is made with."""
    packages = ("transformers", "torch", "lightning", "peft")
    return ", ".join(f"{name} {version(name).partition('+')[0]}" for name in packages)  # no build, such as +cpu


def _ran(launch: Callable[..., object], model_type: str, folder: Path, *strategies: str) -> str:
    """How processes have ended, if they were not done."""
    try:
        launch("tests.architectures.measured", model_type, str(folder), *strategies, timeout=TIMEOUT)
    except AssertionError as error:
        return f"fails: {_how(str(error))}"
    return "–"


def _found(path: Path) -> Row:
    found: Row = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _how(said: str) -> str:
    """How processes have ended: the last exception that they printed, or their exit codes."""
    raised = re.findall(r"^(?:\w+\.)*(\w+(?:Error|Exception|Exit): .*)$", said, re.MULTILINE)
    return raised[-1][:200].replace("|", r"\|") if raised else said.partition(": ")[0]
