"""The floors of docs/contributing.md: a file imports only from lower floors, heavy packages only where they belong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lightning_sft

ROOT = Path(lightning_sft.__file__).parent
FLOORS = [
    {"types", "data.strict_json"},
    {"checkpoints", "disk", "model_card", "gguf_file"}
    | {f"data.{name}" for name in ("files", "formats", "turns", "marks", "account", "examples", "draw", "workers")},
    {"objective", "schedules", "metrics", "guards", "trainer_facts", "demo_data", "demos", "probes", "sharding", "zero"}
    | {f"data.{name}" for name in ("sources", "messages", "template", "packing", "plan", "collate")}
    | {"data.overflow", "data.unpack", "neftune", "new_tokens", "quantized", "adapter_checkpoints"},
    {"pretrained", "export", "first_rank", "resume", "data.encode", "data.loader", "data.pieces", "data.mixture"}
    | {"adapters", "freezing"},
    {"scorer", "generation", "optimizers", "strategies", "demo_model", "run_facts", "parity", "run_folder"}
    | {"data.walk", "data.chunks", "tuning", "adapter_folder"},
    {"module", "data.cache", "data.interleave", "data.blocks"}
    | {f"callbacks.{name}" for name in ("predictions", "checkpoint", "ledger")},
    {"data.dataset", "data.stream", "restore", "callbacks.preempt"},
    {"data.planned", "data.audit", "convert", "callbacks.survival"},
    {"data.report", "callbacks.hf_export"},
    {"datamodule", "show_text", "show_html"},
    {"callbacks", "show"},
    {"replay"},
    {"main"},
    {"__main__"},
]
LIGHTNING_FROM = 4  # the lowest floor that may import lightning
TRANSFORMERS = {
    "pretrained",
    "export",
    "probes",
    "demos",
    "data.template",
    "data.marks",
    "data.encode",
    "data.chunks",
    "data.dataset",
    "data.loader",
}
TRANSFORMERS |= {"module", "scorer", "datamodule", "data.pieces"}  # for the types of what they hold
TRANSFORMERS |= {"parity", "restore", "convert", "callbacks.hf_export"}
TRANSFORMERS |= {"adapters", "adapter_folder", "freezing", "new_tokens", "quantized", "neftune", "tuning"}
LAZY = {"peft", "bitsandbytes", "liger_kernel", "torchao", "deepspeed", "gguf", "datasets"}
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
        elif isinstance(node, ast.ImportFrom) and node.module in ("lightning_sft", "lightning_sft.data"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name.removeprefix("lightning_sft.") in FILES}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def floor(name: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if name in names)


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"data"}))
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
    assert max(lengths.values()) <= 300
    assert sorted(lengths.values())[len(lengths) // 2] <= 120


def test_importing_the_package_does_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import sys, lightning_sft; sys.exit(bool({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
