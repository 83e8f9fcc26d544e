"""What pages of the documentation say, for tests that hold them to it."""

from __future__ import annotations

import ast
import inspect
import io
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any

from torch.optim import AdamW

from lightning_sft.data.rows.mixture import Mixture, Part
from lightning_sft.evaluation.generation import Sampling
from lightning_sft.main import main
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.strategies import FSDP2Strategy

ROOT = Path(__file__).parents[2]
INNER: dict[str, Callable[..., Any]] = {  # sections of a config that the help of fit does not take apart
    "model.lora": Lora,
    "model.sampling": Sampling,
    "model.optimizer.init_args": AdamW,
    "trainer.strategy.init_args": FSDP2Strategy,
    "data.train": Mixture,
    "data.train.parts.NAME": Part,
}


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """A page's part below a heading, up to the next of its level."""
    level = re.match("#+", heading)
    assert level is not None
    return text.partition(f"\n{heading}\n")[2].partition(f"\n{level[0]} ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def tables(text: str) -> Iterator[list[list[str]]]:
    """The rows of each table, as cells; the first is its head."""
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
        assert len({len(row) for row in rows}) == 1, rows
        yield [rows[0], *rows[2:]]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@cache
def options(verb: str) -> frozenset[str]:
    """The options of a verb, without their dashes; empty where there is no such verb."""
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        main([verb, "--help"])
    return frozenset(re.findall(r"^  (?:-\w(?: \w+)?, )?--([\w.]+)", printed.getvalue(), re.MULTILINE))


def is_key(name: str) -> bool:
    """Whether a configuration of fit may have it."""
    outer, _, inner = name.rpartition(".")
    if outer in INNER:
        return inner in inspect.signature(INNER[outer]).parameters
    return name in options("fit")


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Verb and flags of each ``lightning-sft`` in the blocks of shell."""
    for line in "\n".join(blocks(text, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if "lightning-sft" in words:
            verb, *rest = words[words.index("lightning-sft") + 1 :]
            yield verb, [word[2:].partition("=")[0] for word in rest if word.startswith("--")]


def texts(path: Path) -> Iterator[str]:
    """Every text in a file of Python, with … for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.JoinedStr, ast.Constant)):
            yield text_of(node)


def text_of(node: ast.AST) -> str:
    """A literal text; other values are …, as what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return re.sub("…+", "…", "".join(text_of(part) for part in node.values))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"
