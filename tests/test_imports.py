"""The floors of docs/contributing.md: a file imports only from lower floors, heavy packages only where they belong."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lightning_sft

ROOT = Path(lightning_sft.__file__).parent
PAGE = (ROOT.parent / "docs" / "contributing.md").read_text(encoding="utf-8")


def named(text: str) -> set[str]:
    """The modules that a text of the page names in backticks: `data/{turns,files}` are two."""
    found = set()
    for item in re.findall(r"`([^`]+)`", text):
        folder, _, names = item.rpartition("/")
        found |= {f"{folder}.{name}".lstrip(".") for name in names.strip("{}").split(",")}
    return found


FLOORS = [named(files) for files in re.findall(r"^\| \d+ \| (.+) \|$", PAGE, re.MULTILINE)]
[of_transformers] = re.findall(r"^`transformers` is imported (.+?)\n\n", PAGE, re.MULTILINE | re.DOTALL)
TRANSFORMERS = named(of_transformers)
PACKAGES = {"lightning_sft"} | {f"lightning_sft.{path.parent.name}" for path in ROOT.glob("*/__init__.py")}
LIGHTNING_FROM = 5  # the lowest floor that may import lightning
LAZY = {"triton", "peft", "bitsandbytes", "liger_kernel", "torchao", "deepspeed", "gguf", "datasets"}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if path != ROOT / "__init__.py"
}


def imported(path: Path) -> set[str]:
    """Modules that a file imports at its top level."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in PACKAGES:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name.removeprefix("lightning_sft.") in FILES}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def floor(name: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if name in names)


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"attention", "data", "export", "planning", "tuning", "verify"}))
def test_a_file_imports_only_from_lower_floors(name: str) -> None:
    for module in imported(FILES[name]):
        package, _, rest = module.partition(".")
        if package == "lightning_sft":
            assert floor(rest) < floor(name), f"{name} imports {rest}"
        if package == "lightning":
            assert floor(name) >= LIGHTNING_FROM, f"{name} imports {module}"
        if package == "transformers":
            assert name in TRANSFORMERS, f"{name} imports {module}"
        assert package not in LAZY, f"{name} imports {module} at its top level"


def test_files_are_short() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert max(lengths.values()) <= 400
    assert sorted(lengths.values())[len(lengths) // 2] <= 120


def test_importing_the_package_does_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import sys, lightning_sft; sys.exit(bool({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
