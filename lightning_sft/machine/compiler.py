"""System requirements of ``torch.compile``."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec


def compiler_missing(on_gpu: bool) -> str | None:
    """The requirement of ``torch.compile`` that this machine lacks, or ``None``."""
    if on_gpu and find_spec("triton") is None:
        return "it needs triton: pip install triton"
    name = os.environ.get("CXX") or "g++"
    return None if shutil.which(name) else f"it needs a C++ compiler: no {name}"
