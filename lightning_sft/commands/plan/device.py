"""Memory of a device: its capacity per process, and what is used before the model is loaded."""

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
    """Memory of one of the devices that a fit runs on.

    Args:
        name: ``CPU`` or ``GPU``.
        capacity: Bytes available to a process; ``None`` if unknown.
        base: Bytes used before the model is loaded.
    """

    name: str
    capacity: float | None
    base: float

    @classmethod
    def of(cls, accelerator: str, num_local: int, memory: float | None = None) -> Device:
        """The device of a trainer's settings; the capacity of a GPU that is not in this machine is unknown.

        On CPUs, a process starts with the memory of this one (packages and data), and the processes of a machine share
        what is available.

        Args:
            accelerator: Accelerator of Lightning's trainer.
            num_local: Number of processes per machine.
            memory: GiB of memory per device, or of the machine for CPUs; ``None`` takes that of this machine.
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
    """Resident memory of this process in bytes; on macOS its peak, on Windows 0."""
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
    """Available memory of the machine in bytes; on macOS all of its memory, on Windows infinite."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        pass
    if not hasattr(os, "sysconf"):
        return math.inf
    return float(os.sysconf("SC_PHYS_PAGES") * PAGESIZE)


def _limits_of_container(root: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """Bytes left to the container, after an infinite value for machines without one."""
    yield float("inf")
    try:
        limit, used = (root / name for name in ("memory.max", "memory.current"))
        yield float(limit.read_text()) - float(used.read_text())
    except (OSError, ValueError):  # no container, or "max"
        return
