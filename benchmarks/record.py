"""What the script of a system writes while it trains: a line of JSON for each optimizer step, as it ends.

Only the standard library: every environment imports it, before it imports anything else.
"""

from __future__ import annotations

import json
import sys
import time
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


def settings() -> SimpleNamespace:
    """Those of this process: its argument, as JSON."""
    return SimpleNamespace(**json.loads(sys.argv[1]))


def rows_of(path: str) -> list[dict[str, Any]]:
    """The rows of a file.

    Each has ``prompt`` and ``completion``; or, where all systems are given the same batches, ``input_ids`` and
    ``labels``, which stand at their own positions.
    """
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
