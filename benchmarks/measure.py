"""Runs a script of a system in its environment, and measures the process from outside: time, and memory at its peak."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import environments
from benchmarks.environments import ROOT

_SCRIPTS = {name: ROOT / "benchmarks" / f"run_{name}.py" for name in ("ours", "trl", "litgpt", "llamafactory")}
_SCRIPTS["limits"] = ROOT / "benchmarks" / "limits.py"
_SCRIPTS["gpu"] = ROOT / "benchmarks" / "gpu" / "case.py"
_EVERY, _EVERY_CHILD = 0.05, 1.0  # seconds between looks at a process, and at those that it has started


@dataclass
class Run:
    """What a process has shown.

    Args:
        began: When it was started, as ``time.time()``.
        seconds: How long it took.
        peak_bytes: Most memory of the process and those that it started.
        lines: What it has recorded, see :mod:`benchmarks.record`.
        error: The end of its output, where it has failed.
    """

    began: float
    seconds: float
    peak_bytes: int
    lines: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


def run(
    python: Path,
    script: str,
    settings: Mapping[str, Any],
    folder: Path,
    *,
    threads: int,
    environment: Mapping[str, str] | None = None,
    timeout: float = 1800,
) -> Run:
    """Run a script to its end.

    Args:
        python: The interpreter of the environment.
        script: ``ours``, ``trl``, ``litgpt``, ``llamafactory``, ``limits`` or ``gpu``.
        settings: What the script gets, besides the files for its record and its own output.
        folder: For these files; it is made.
        threads: Threads of the process's arithmetic.
        environment: Variables of its environment beside ours.
        timeout: Seconds after which it is ended, and has failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record, log = folder / "record.jsonl", folder / "log.txt"
    record.unlink(missing_ok=True)
    given = json.dumps({**settings, "out": str(record), "folder": str(folder / "output")})
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), **(environment or {})}
    began = time.time()
    with log.open("w", encoding="utf-8") as output:
        command = [str(python), "-P", str(_SCRIPTS[script]), given]  # -P: benchmarks/ itself is not on the path
        start: Any = {"env": variables, "stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, cwd=folder, **start)
        try:
            peak = _peak_bytes(process, began + timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    error = None
    if process.returncode:
        error = f"{log.read_text(encoding='utf-8', errors='replace')[-2000:]}\nExit code {process.returncode}."
    lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
    return Run(began, time.time() - began, peak, [json.loads(line) for line in lines], error)


class Scripts:
    """Runs scripts one after the other, each in a folder of its own, and says so.

    Args:
        out: Folder of the folders.
        threads: Threads of each process's arithmetic.
        python: One interpreter for all systems, instead of their environments.
        common: Settings that all scripts get.
    """

    def __init__(self, out: Path, threads: int, python: Path | None, common: dict[str, Any]) -> None:
        self.out, self.threads, self.python, self.common = out, threads, python, common

    def __call__(
        self, name: str, folder: str, *, environment: Mapping[str, str] | None = None, threads: int = 0, **settings: Any
    ) -> Run:
        """Run a script to its end."""
        print(f"{folder} ... ", end="", flush=True)
        python = self.python or environments.python(name if name in environments.REQUIREMENTS else "ours")
        where, threads = self.out / folder, threads or self.threads
        done = run(python, name, self.common | settings, where, threads=threads, environment=environment)
        rate = done.lines[-1]["tokens"] / (done.lines[-1]["at"] - done.lines[-2]["at"]) if len(done.lines) > 1 else 0
        print(f"{done.seconds:.0f} s" + (f", last step {rate:,.0f} tokens/s" if rate else ""), flush=True)
        if done.error:
            print(f"FAILED, see {where / 'log.txt'}: {done.error[-300:]}", flush=True)
        return done


def _peak_bytes(process: subprocess.Popen[bytes], until: float) -> int:
    """Resident memory of the process and, of its children, what is theirs alone, until it ends or the time is up.

    Data loaders' workers share the pages of the process that they were forked from: these count once.
    """
    peak = children = 0
    look_at_children, watched = 0.0, psutil.Process(process.pid)
    while process.poll() is None and time.time() < until:
        try:
            if time.time() > look_at_children:
                children = sum(child.memory_full_info().uss for child in watched.children(recursive=True))
                look_at_children = time.time() + _EVERY_CHILD
            peak = max(peak, watched.memory_info().rss + children)
        except psutil.Error:  # one of them has just ended
            pass
        time.sleep(_EVERY)
    return peak
