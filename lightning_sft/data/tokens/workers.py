"""Data loaders whose worker processes come and go quietly."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import worker as _worker

_THREADS = "TOKENIZERS_PARALLELISM"


def num_cores(share: int = 1) -> int:
    """Worker processes that pay where ``share`` processes share the machine: one a core, at most 8, or none."""
    cores = min(8, len(os.sched_getaffinity(0)) // share) if hasattr(os, "sched_getaffinity") else 0
    return cores if cores > 1 else 0


def iterate(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader, in its order.

    Its workers are forked with tokenizers that use one thread each: the threads of this process do not live on in
    them. Told nothing, tokenizers find out by themselves, and warn in each.
    """
    with _environment(_THREADS, "false"):
        items = iter(loader)
    yield from items


def leave_signals(worker: int) -> None:
    """Have a worker process ignore termination signals: the training process gets them too, and stops its workers.

    Ctrl-C reaches all processes of a terminal, and SLURM signals all of a job. A worker that ended at once would take
    the rest of an optimizer step with it.

    Args:
        worker: Number of the worker, unused.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):  # Windows lacks some
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def take_turn() -> tuple[int, int]:
    """Number of this worker process, and how many there are: (0, 1) in a process that is none.

    From then on, ``get_worker_info`` finds no worker: a data set that takes its share of the rows by it, as a
    ``datasets.IterableDataset`` does, would leave out rows of the chunks that are this worker's.
    """
    info = get_worker_info()
    if info is None:
        return 0, 1
    _worker._worker_info = None
    return info.id, info.num_workers


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
