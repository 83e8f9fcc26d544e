"""One order of packages, imports only to the left, no circle between files: docs/contributing.md says why."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lightning_sft

ROOT = Path(lightning_sft.__file__).parent
ORDER = [
    *("machine", "types", "io", "head", "objective"),
    *("data.rows", "data.tokens", "data.batches", "data.inspect"),
    *("training", "checkpoints", "model", "strategies", "evaluation"),
    *("module", "datamodule", "export", "callbacks", "demos", "commands", "main", "__main__"),
]
LAZY = {"triton", "peft", "bitsandbytes", "liger_kernel", "torchao", "deepspeed", "gguf", "datasets"}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if path != ROOT / "__init__.py"
}


SETTINGS = {  # arguments named trainer that are the settings of one, which a verb gets without making a trainer
    *("commands.plan.command.plan", "commands.plan.command.steps_of"),
    *("commands.replay.replay", "commands.replay._batches", "commands.replay._losses"),
    *("commands.show.command.show", "commands.show.command._previewed"),
    *("commands.verify.command.verify", "commands.verify.subject.Subject", "commands.verify.subject.of"),
}


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run: ``if TYPE_CHECKING:`` imports types alone, which may come from anywhere."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node = ast.Module(node.orelse, [])
        yield node
        yield from executed(node)


def imported(path: Path) -> set[str]:
    """Modules that a file imports, also inside functions; those of ours without the name of the package."""
    found: set[str] = set()
    for node in executed(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in members if name.removeprefix("lightning_sft.") in FILES}
            found |= modules or {node.module}
    return {name.removeprefix("lightning_sft.") for name in found}


def annotations(path: Path) -> Iterator[tuple[str, str, str]]:
    """The arguments of each function and the fields of each class: its name, theirs, and their annotations."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                yield node.name, argument.arg, ast.unparse(argument.annotation) if argument.annotation else "Any"
        elif isinstance(node, ast.ClassDef):
            for field in (field for field in node.body if isinstance(field, ast.AnnAssign)):
                yield node.name, ast.unparse(field.target), ast.unparse(field.annotation)


def place(name: str) -> int:
    """Where the package of a file stands in the order."""
    return max(number for number, package in enumerate(ORDER) if f"{name}.".startswith(f"{package}."))


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"data"}))
def test_a_file_imports_only_from_its_own_package_and_those_before_it(name: str) -> None:
    for module in imported(FILES[name]) & FILES.keys():
        assert place(module) <= place(name), f"{name} imports {module}"
        assert {name, module} != {"module", "datamodule"}


def test_no_files_import_each_other_in_a_circle() -> None:
    edges = {name: (imported(path) & FILES.keys()) - {name} for name, path in FILES.items()}
    TopologicalSorter(edges).prepare()  # raises CycleError


def test_a_trainer_and_a_module_of_lightning_have_its_types() -> None:
    untyped = {
        f"{name}.{of}"
        for name, path in FILES.items()
        for of, argument, annotation in annotations(path)
        if argument in ("trainer", "pl_module") and "Any" in annotation.split(" | ")
    }
    assert untyped == SETTINGS


@pytest.mark.parametrize("name", sorted(FILES))
def test_heavy_packages_are_imported_inside_functions(name: str) -> None:
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not LAZY & {module.partition(".")[0] for module in top}


def test_every_file_stands_in_a_package_of_the_order_and_has_at_most_400_lines() -> None:
    for name, path in FILES.items():
        assert name == "data" or any(f"{name}.".startswith(f"{package}.") for package in ORDER), name
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, name


@pytest.mark.parametrize("name", sorted(name for name, path in FILES.items() if path.name == "__init__.py"))
def test_a_package_says_what_comes_in_what_goes_out_and_what_it_may_import(name: str) -> None:
    text = ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8"))) or ""
    assert [line.partition(":")[0] for line in text.splitlines() if ": " in line][-3:] == ["In", "Out", "May import"]


def test_importing_the_package_does_nothing_heavy() -> None:
    code = "import sys, lightning_sft; sys.exit(bool({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
