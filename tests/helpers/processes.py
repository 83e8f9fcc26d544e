"""Processes that tests start: one that hangs is ended with all its children, and its test shows where they stood."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

import psutil

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def torchrun(module: str, *arguments: str, processes: int = 2, timeout: float = 300) -> None:
    """Run a module in so many processes."""
    run([*TORCHRUN, f"--nproc-per-node={processes}", "-m", module, *arguments], timeout=timeout)


def run(command: Sequence[str], *, cwd: Path = ROOT, timeout: float = 300, without: Sequence[str] = ()) -> str:
    """What a command prints to its standard output, with one thread and this repository on its path.

    Args:
        command: Program and arguments.
        cwd: Folder that it runs in.
        timeout: Seconds after which it counts as hanging.
        without: Variables of the environment that it does not get.

    Raises:
        AssertionError: It failed or hung; with its output, and after a hang with the stacks of all its processes.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    for name in without:
        environment.pop(name, None)
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=out, stderr=err)
        try:
            how = f"exit code {process.wait(timeout)}"
        except subprocess.TimeoutExpired:
            how = f"no end after {timeout} s"
            for hanging in [process, *psutil.Process(process.pid).children(recursive=True)]:
                _end(hanging)
        printed, errors = (file.seek(0) or file.read() for file in (out, err))
    assert how == "exit code 0", f"{how}: {' '.join(command)}\n{printed[-10_000:]}\n{errors[-20_000:]}"
    return printed


def _end(process: psutil.Process | subprocess.Popen[bytes]) -> None:
    """SIGABRT has Python print the stacks of its threads."""
    process.send_signal(signal.SIGABRT)
    try:
        process.wait(timeout=5)
    except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
        process.kill()
        process.wait()
