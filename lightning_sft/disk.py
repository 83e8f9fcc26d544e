"""What is on the disk, and not only in the memory that the system keeps for it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_ON_WINDOWS = os.name == "nt"


def sync(paths: Iterable[Path]) -> None:
    """Wait until files, and the entries of folders, are on the disk: what is renamed after that is whole there.

    Windows opens no folders, and syncs no file that is open for reading alone.
    """
    for path in paths:
        if _ON_WINDOWS and path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDWR if _ON_WINDOWS else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
