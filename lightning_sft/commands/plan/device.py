"""What a device has for a process, and what is taken of it before there is a model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import PAGESIZE
from pathlib import Path

import torch

GIB = 2.0**30
_CUDA_CONTEXT = 0.6 * GIB  # CUDA's context, cuBLAS's workspace


@dataclass(frozen=True)
class Device:
    """One of those that a fit runs on.

    Args:
        name: ``CPU`` or ``GPU``.
        capacity: Bytes that a process may have of it; ``None`` where nobody knows.
        base: Bytes that are taken before there is a model.
    """

    name: str
    capacity: float | None
    base: float

    @classmethod
    def of(cls, accelerator: str, num_local: int, memory: float | None = None) -> Device:
        """That of a trainer's settings; of a GPU that is not here, nobody knows what it has.

        On a CPU, a process begins as this one is now, with the same packages and the data; those of a machine share
        what it has left.

        Args:
            accelerator: As Lightning's trainer takes it.
            num_local: Processes on a machine.
            memory: GiB of a device, or of a machine where the device is its CPU.
        """
        given = None if memory is None else memory * GIB
        if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
            own = resident()
            left = min(_available(), *_limits_of_container()) + own
            capacity = left if given is None else given
            return cls("CPU", capacity / num_local if math.isfinite(capacity) else None, own)
        if given is None and torch.cuda.is_available():
            given = float(torch.cuda.get_device_properties(0).total_memory)
        return cls("GPU", given, _CUDA_CONTEXT)


def resident() -> float:
    """Bytes of memory that this process takes now; the most that it has taken on macOS, and 0 on Windows."""
    try:
        return float(int(Path("/proc/self/statm").read_text().split()[1]) * PAGESIZE)
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0.0
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _available() -> float:
    """What the machine could still give; all that it has on macOS, and infinite on Windows, which says neither here."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        pass
    if not hasattr(os, "sysconf"):
        return math.inf
    return float(os.sysconf("SC_PHYS_PAGES") * PAGESIZE)


def _limits_of_container(root: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """What a container may still take; at least an infinite amount."""
    yield float("inf")
    try:
        limit, used = (root / name for name in ("memory.max", "memory.current"))
        yield float(limit.read_text()) - float(used.read_text())
    except (OSError, ValueError):  # no container, or "max"
        return
