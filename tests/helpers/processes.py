"""Processes that tests start: one that hangs is ended with all its children, and its test shows where they stood.

Modules run in forks of one process that has imported what they need, since imports are most of what a short run costs.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import NamedTuple
from unittest.mock import patch

import psutil

ROOT = Path(__file__).parents[2]
SETTINGS = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *(f"lightning_sft.{name}" for name in ("main", "module", "datamodule", "callbacks", "strategies")),
        *("datasets", "pandas", "peft", "torch._dynamo", "torch._inductor.config", "torch.distributed.tensor"),
        "transformers.models.llama.modeling_llama",
    ]
)


class Ended(NamedTuple):
    """How a process has ended."""

    code: int
    printed: str
    errors: str


def torchrun(
    module: str, *arguments: str, processes: int = 2, timeout: float = 300, fails: bool = False
) -> list[Ended]:
    """Run a module in so many processes, each with the variables that torchrun gives it; see :func:`fork`.

    Raises:
        AssertionError: One failed or hung; with what all have printed, and the stacks of those that had to be ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    ranks = [{**common, "TORCHELASTIC_RUN_ID": "tests", "RANK": n, "LOCAL_RANK": n} for n in range(processes)]
    return fork(module, *arguments, ranks=ranks, timeout=timeout, fails=fails)


def fork(
    module: str,
    *arguments: str,
    ranks: Sequence[Mapping[str, object]] = ({},),
    timeout: float = 300,
    without: Sequence[str] = (),
    fails: bool = False,
) -> list[Ended]:
    """Run a module, as ``python -m`` does, in one process for each rank; when one fails, the others are ended.

    Args:
        module: Its name.
        arguments: Its arguments.
        ranks: Variables of the environment that each process has of its own.
        timeout: Seconds after which they count as hanging.
        without: Variables of the environment that they do not get.
        fails: Whether they may fail.

    Raises:
        AssertionError: One failed or hung; with what all have printed, and the stacks of those that had to be ended.
    """
    common = {name: value for name, value in (os.environ | SETTINGS).items() if name not in without}
    with TemporaryDirectory() as folder:
        files = [tuple(str(Path(folder, f"{kind}{rank}")) for kind in ("out", "err")) for rank in range(len(ranks))]
        processes = []
        for own, (out, err) in zip(ranks, files, strict=True):
            Path(out).touch(), Path(err).touch()  # of a process that is ended before it has begun
            environment = common | {name: str(value) for name, value in own.items()}
            work = (module, arguments, environment, out, err)
            processes.append(FORKS.Process(target=_begin, args=work, daemon=False))
        with patch.dict(os.environ, SETTINGS):  # of the process that forks, if it begins here
            for process in processes:
                process.start()
        end, hang = time.monotonic() + timeout, False
        while (left := [p for p in processes if p.exitcode is None]) and not any(p.exitcode for p in processes):
            hang = not wait([p.sentinel for p in left], max(end - time.monotonic(), 0))
            if hang:
                break
        for process in left:
            _end_all(process.pid)
            process.join()
        ended = [
            Ended(process.exitcode or 0, *(Path(file).read_text(errors="replace") for file in pair))
            for process, pair in zip(processes, files, strict=True)
        ]
    if not fails:
        codes = ", ".join(str(one.code) for one in ended)
        texts = "\n".join(f"{one.printed[-10_000:]}\n{one.errors[-20_000:]}" for one in ended)
        how = f"no end after {timeout} s" if hang else f"exit code {codes}"
        assert not any(one.code for one in ended), f"{how}: {module} {' '.join(arguments)}\n{texts}"
    return ended


def _begin(module: str, arguments: Sequence[str], environment: dict[str, str], out: str, err: str) -> None:
    """In the forked process."""
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    faulthandler.enable()
    multiprocessing.set_start_method(None, force=True)  # its own processes are begun as those of any program
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


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
    environment = os.environ | SETTINGS
    for name in without:
        environment.pop(name, None)
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=out, stderr=err)
        try:
            how = f"exit code {process.wait(timeout)}"
        except subprocess.TimeoutExpired:
            how = f"no end after {timeout} s"
            _end_all(process.pid)
            process.wait()
        printed, errors = (file.seek(0) or file.read() for file in (out, err))
    assert how == "exit code 0", f"{how}: {' '.join(command)}\n{printed[-10_000:]}\n{errors[-20_000:]}"
    return printed


def _end_all(number: int) -> None:
    """End a process and its children; SIGABRT has Python print the stacks of its threads."""
    try:
        process = psutil.Process(number)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for hanging in family:
        try:
            hanging.send_signal(signal.SIGABRT)
            hanging.wait(timeout=5)
        except psutil.TimeoutExpired:
            hanging.kill()
            hanging.wait()
        except psutil.NoSuchProcess:
            pass
