"""One case, in a process of its own: `python -P benchmarks/gpu/case.py '{"task": ...}'`.

What a task needs is imported by it alone: TRL's process has nothing of ours, a command line starts in a bare process.
"""

from __future__ import annotations

import importlib

from benchmarks.record import settings

_TASKS = {
    "correctness": ("correctness", "check"),
    "smoke": ("smoke", "check"),
    "resume": ("resume", "check"),
    "resume_run": ("resume", "run"),
    "ours": ("throughput", "train"),
    "trl": ("peers", "train"),
}

if __name__ == "__main__":
    given = settings()
    module, function = _TASKS[given.task]
    getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(given)
