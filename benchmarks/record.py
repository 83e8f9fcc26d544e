"""What the script of a system writes while it trains: a line of JSON for each optimizer step, as it ends.

Only the standard library: every environment imports it, before it imports anything else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class Record:
    """Appends lines to a file, each with the time at which it was written.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def step(self, loss: float, tokens: int, targets: int, positions: int) -> None:
        """An optimizer step has ended.

        Args:
            loss: The loss that the system reports of it.
            tokens: Its real tokens, without padding.
            targets: Those of them that the loss is on.
            positions: Its tokens with padding.
        """
        import torch

        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        self.write(loss=loss, tokens=tokens, targets=targets, positions=positions, device_bytes=peak)

    def write(self, **facts: Any) -> None:
        """A line of its own."""
        with Path(self.path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": time.time(), **facts}) + "\n")


def die() -> None:
    """End this process as a lost machine does."""
    os.kill(os.getpid(), signal.SIGKILL)


def settings() -> SimpleNamespace:
    """Those of this process: its argument, as JSON."""
    return SimpleNamespace(**json.loads(sys.argv[1]))


def each_or_error(encode: Callable[[list[dict[str, Any]]], list[Any]], rows: list[dict[str, Any]]) -> list[Any]:
    """What a system makes of each row: its sequences, or the error it raises, as text.

    Rows are given all at once, as users do, and one by one where that fails or loses rows.

    Args:
        encode: Encodes rows.
        rows: The rows.
    """

    def tried(some: list[dict[str, Any]]) -> list[Any]:
        try:
            return encode(some)
        except Exception as error:
            return [f"{type(error).__name__}: {error}"[:300]] * len(some)

    together = tried(rows)
    if len(together) == len(rows) and not any(isinstance(found, str) for found in together):
        return together
    if together and together == together[:1] * len(rows) and tried(rows[:1]) == together[:1]:
        return together  # the same error for all
    return [(tried([row]) or ["left out"])[0] for row in rows]


def rows_of(path: str) -> list[dict[str, Any]]:
    """The rows of a file.

    Each has ``prompt`` and ``completion``; or, where all systems are given the same batches, ``input_ids`` and
    ``labels``, which stand at their own positions.
    """
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
