"""Where a run was: the card, its driver, versions, and the commit, which a machine without git has in a file."""

from __future__ import annotations

import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.environments import ROOT

COMMIT = "COMMIT"
"""File of the commit, in a folder that :mod:`benchmarks.gpu.stage` has made."""

_PACKAGES = ("torch", "transformers", "lightning", "trl", "liger-kernel", "flash-attn", "peft", "torchao", "triton")


def facts(note: str = "") -> dict[str, Any]:
    """The facts of this machine and this checkout.

    Args:
        note: What a reader has to know.
    """
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    card, driver, memory = [*_output(query).split(", "), "", "", ""][:3]
    return {
        "card": f"{card}, {memory}" if card else "No GPU",
        "driver": driver or "none",
        "cuda": torch.version.cuda or "none",
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "note": note,
    }


def commit(root: Path = ROOT) -> str:
    """The commit of a checkout, with ``+`` where files have been changed since; ``unknown`` without git."""
    if (root / COMMIT).is_file():
        return (root / COMMIT).read_text(encoding="utf-8").strip()
    found = _output(["git", "-C", str(root), "rev-parse", "--short", "HEAD"])
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return (found or "unknown") + ("+" if changed else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(command: list[str]) -> str:
    """The first line of what a command prints; nothing where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return "" if done.returncode else next(iter(done.stdout.strip().splitlines()), "")
