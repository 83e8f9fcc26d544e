"""One process at a time writes to the folder of a run; a second one is told who does."""

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
    fcntl = None  # type: ignore[assignment]  # where types know a module

LOCK_FILE = ".lock"


class FolderLock:
    """Keeps a folder for the run of this process, from the start of a fit to its end.

    It is a record lock of POSIX on a file in the folder. The system releases it when the process ends, however it
    does, and worker processes do not inherit it: what a killed process has left locks nobody out. Callbacks of a run
    share it. Where the file system has no locks, nothing is locked.
    """

    _held: ClassVar[dict[Path, tuple[IO[str], int]]] = {}  # of this process: the file, and how many callbacks hold it

    def __init__(self) -> None:
        self._path: Path | None = None

    def take(self, trainer: Trainer, folder: Path) -> None:
        """Lock a folder, which is made if need be; every rank calls it, rank 0 holds it.

        Raises:
            InputError: When another process has it, or nothing can be written there.
        """
        self.release()
        first_rank_does(trainer, lambda: self._take(folder))

    def release(self) -> None:
        """Let others have the folder."""
        if self._path is None:
            return
        path, self._path = self._path, None
        file, count = self._held.pop(path)
        if count > 1:
            self._held[path] = file, count - 1
        else:
            with suppress(OSError):  # Windows removes no open file
                path.unlink()
            file.close()

    def _take(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder.resolve() / LOCK_FILE
            file, count = self._held.get(path) or (_locked(path), 0)
        except OSError as error:
            raise InputError(
                f"The run cannot write to its folder {folder}: {error.strerror or error}. Set trainer.default_root_dir "
                "to a folder that it can write to."
            ) from error
        self._held[path], self._path = (file, count + 1), path


def _locked(path: Path) -> IO[str]:
    """The file, locked by this process and with its name in it."""
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
                f"{path.parent} is in use: {owner} is training there. Wait until it has ended, or give this run a "
                "folder of its own (trainer.default_root_dir)."
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
    except (ValueError, KeyError, TypeError):  # it is just about to write it
        return "another process"
