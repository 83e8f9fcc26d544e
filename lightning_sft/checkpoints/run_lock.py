"""A lock on the folder of a run, to which only one process at a time may write."""

from __future__ import annotations

import json
import os
import socket
import warnings
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar

from lightning_sft.training.trainer import first_rank_does
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

try:
    import fcntl
except ImportError:  # Windows has no such locks: nothing is locked there
    fcntl = None  # type: ignore[assignment]  # the type stubs expect a module

LOCK_FILE = ".lock"


class FolderLock:
    """Locks a folder for the run of this process, from the start to the end of a fit.

    It is a POSIX record lock on a file in the folder. The system releases it when the process ends for whatever reason,
    and worker processes do not inherit it, so there are no stale locks. Callbacks of a run share it. File systems
    without locks are not locked. Folders that it creates are removed at the end if nothing has been written to them.
    """

    _held: ClassVar[dict[Path, tuple[IO[str], int]]] = {}  # by path: the file, and the number of holders
    _made: ClassVar[list[Path]] = []  # folders created for locks that are held, parents first

    def __init__(self) -> None:
        self._path: Path | None = None

    def take(self, trainer: Trainer, folder: Path) -> None:
        """Lock a folder, creating it if needed; every rank must call this, rank 0 holds the lock.

        Raises:
            InputError: When another process holds the lock, or the folder is not writable.
        """
        self.release()
        first_rank_does(trainer, lambda: self._take(folder))

    def release(self) -> None:
        """Release the lock."""
        if self._path is None:
            return
        path, self._path = self._path, None
        file, count = self._held.pop(path)
        if count > 1:
            self._held[path] = file, count - 1
        else:
            with suppress(OSError):  # Windows does not remove open files
                path.unlink()
            file.close()
        while not self._held and self._made:
            with suppress(OSError):  # the run has written to it
                self._made.pop().rmdir()

    def _take(self, folder: Path) -> None:
        try:
            path = folder.resolve() / LOCK_FILE
            made = [parent for parent in reversed(path.parents) if not parent.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            self._made.extend(made)
            file, count = self._held.get(path) or (_locked(path), 0)
        except OSError as error:
            raise InputError(
                f"The run cannot write to its folder {folder}: {error.strerror or error}. Set trainer.default_root_dir "
                "to a folder that it can write to."
            ) from error
        self._held[path], self._path = (file, count + 1), path


def _locked(path: Path) -> IO[str]:
    """Lock the file and write the owner into it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            owner = _owner(file.read())
            file.close()
            raise InputError(
                f"{path.parent} is in use: {owner} is training there. Wait for it to end, or give this run a separate "
                "folder (trainer.default_root_dir)."
            ) from error
        except OSError as error:
            warnings.warn(f"{path.parent} is not locked, as its file system has no locks: {error}", stacklevel=2)
        with suppress(FileNotFoundError):  # its owner has just removed it
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    file.truncate(0)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": now}) + "\n")
    file.flush()
    return file


def _owner(text: str) -> str:
    try:
        found = json.loads(text)
        return f"process {found['process']} on {found['host']}, since {found['since']},"
    except (ValueError, KeyError, TypeError):  # the owner is about to write it
        return "another process"
