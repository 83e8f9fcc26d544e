"""Atomic file writes: write under a hidden name, sync to disk, rename."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from lightning_sft.types import InputError

PARTIAL = ".partial"
"""Suffix of the names of incomplete files."""

_ON_WINDOWS = os.name == "nt"


def short_path(path: str | Path) -> str:
    """A path as seen from the current folder, where that is within it.

    >>> short_path(Path.cwd() / "runs" / "a.ckpt"), short_path("/elsewhere/a.ckpt")
    ('runs/a.ckpt', '/elsewhere/a.ckpt')
    """
    with suppress(ValueError):
        return Path(path).relative_to(Path.cwd()).as_posix()
    return str(path)


def sync(paths: Iterable[Path]) -> None:
    """Wait until files, and the entries of folders, are on the disk, so that a rename after that is atomic.

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


def hidden(path: str | Path) -> Path:
    """The name beside ``path`` under which it is written, before :func:`publish`."""
    return Path(path).with_name(f".{Path(path).name}{PARTIAL}")


def publish(path: str | Path) -> None:
    """Rename the file or folder at :func:`hidden` to its final name, after it has been synced to disk.

    A process that is killed, or a disk that is full, leaves ``path`` missing or as it was before.

    Args:
        path: A file or a folder.
    """
    path, partial = Path(path), hidden(path)
    sync([*(partial.rglob("*") if partial.is_dir() else ()), partial])
    if path.is_dir():  # a folder cannot take the place of another
        remove(path)
    partial.replace(path)
    sync([path.parent])


def remove(path: Path) -> None:
    """Remove a file or a folder; a folder that is removed only half is under a hidden name by then."""
    if path.is_dir() and not path.is_symlink():
        gone = path if path.name.endswith(PARTIAL) else path.rename(path.with_name(f".{path.name}.removed{PARTIAL}"))
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole(*paths: str | Path) -> Iterator[list[Path]]:
    """Hidden names under which files are written; they get their own, in order, when the context ends without an error.

    Args:
        paths: The names of the files.
    """
    partial = [hidden(path) for path in paths]
    try:
        yield partial
        sync(partial)
        for hidden_name, path in zip(partial, paths, strict=True):
            hidden_name.replace(path)
        sync({Path(path).parent for path in paths})
    finally:
        for path in partial:
            remove(path)


@contextmanager
def whole_folder(out: str | Path, replace: bool = False) -> Iterator[Path]:
    """Context to write a folder atomically: it appears under its name only when it is complete and on disk.

    Args:
        out: Path of the folder. Files are written to a hidden folder beside it, which is removed at the end.
        replace: Whether to replace an existing folder; otherwise it must not exist, or be empty.

    Raises:
        InputError: When the folder is not empty.
    """
    out = Path(out)
    if not replace:
        check_is_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    own = Path(mkdtemp(prefix=f".{out.name}.", dir=out.parent))  # new, so no other process writes to it
    unfinished, old = own / "unfinished", own / "old"
    unfinished.mkdir()
    try:
        yield unfinished
        for path in unfinished.rglob("*"):
            if path.is_file():
                share(path)
        sync([*unfinished.rglob("*"), unfinished])
        if out.exists():
            out.rename(old)
        try:
            unfinished.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        sync([out.parent])
    finally:
        shutil.rmtree(own, ignore_errors=True)


def share(path: Path) -> None:
    """Give a file the permissions of its folder, as the umask does: safetensors files are for their owner alone."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def check_is_free(out: Path) -> None:
    """Refuse to overwrite a folder or a file.

    Raises:
        InputError: When the path is a file, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} already exists. Give a new folder, or remove it first.")


def write(path: str | Path, text: str) -> None:
    """Write a text file atomically.

    Args:
        path: Path of the file; its folder is created if missing.
        text: Content of the file.

    Raises:
        InputError: When it cannot be written, as on a full disk.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as [partial]:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritten(path, error) from error


def append(path: str | Path, text: str) -> None:
    """Add lines to a file and bring them to the disk: all of them, or none where the disk is full.

    Args:
        path: The file; it need not exist.
        text: Whole lines.

    Raises:
        InputError: When they cannot be written.
    """
    left = memoryview(text.encode())
    try:
        with Path(path).open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise _unwritten(path, error) from error


def rows_of(path: str | Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The objects of a JSONL file, each with the position in bytes where its line ends.

    A last line without its end was cut short, and is left out; any other that is no JSON object is skipped with a
    warning that names it.
    """
    end = 0
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                row = json.loads(line)
            except ValueError:  # neither JSON nor UTF-8
                row = None
            if isinstance(row, dict):
                yield row, end
            else:
                warnings.warn(f"Skipping line {number} of {path}: it is damaged, no JSON object.", stacklevel=2)


def _unwritten(path: str | Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be written: {error.strerror or error}. What was there before is intact.")
