"""Files and folders by address (``s3://``, ``gs://``, ``memory://``, …), with the methods of a path that both have."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import IO, Any

from lightning_sft.types import InputError


def is_address(path: Any) -> bool:
    """Whether a path is an address of fsspec rather than one on this machine.

    >>> is_address("s3://bucket/run"), is_address("runs/one")
    (True, False)
    """
    return "://" in str(path)


class Address:
    """A file or folder of a file system of fsspec, with the methods of :class:`pathlib.Path` that are needed of both.

    Args:
        address: The address, such as ``s3://bucket/folder``.

    Raises:
        InputError: When its protocol is unknown, or needs a package that is not installed.

    >>> folder = Address("memory://runs/one/")
    >>> str(folder / "a.ckpt"), (folder / "a.ckpt").exists()
    ('memory://runs/one/a.ckpt', False)
    """

    def __init__(self, address: str | Address) -> None:
        from fsspec.core import url_to_fs

        self._address = str(address).rstrip("/")
        try:
            self._system, self._path = url_to_fs(self._address)
        except (ValueError, ImportError) as error:
            raise InputError(f"{self._address!r} is not available: {error}") from error

    def __str__(self) -> str:
        return self._address

    def __repr__(self) -> str:
        return f"Address({self._address!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(self._address)

    def __lt__(self, other: Address) -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self._address}/{name}")

    @property
    def name(self) -> str:
        """The part of the address after its last slash."""
        return self._address.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The last suffix of the name, such as ``.ckpt``."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Address:
        """The folder."""
        return Address(self._address.rpartition("/")[0])

    def resolve(self) -> Address:
        """The address, which has no links."""
        return self

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        return bool(self._system.exists(self._path))

    def is_file(self) -> bool:
        """Whether there is a file."""
        return bool(self._system.isfile(self._path))

    def is_dir(self) -> bool:
        """Whether there is a folder, which in an object store has a file in it."""
        return bool(self._system.isdir(self._path))

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Make the folder and those above it, where the file system has folders."""
        self._system.makedirs(self._path, exist_ok=exist_ok)

    def glob(self, pattern: str) -> list[Address]:
        """The files and folders in this folder whose names match a pattern."""
        self._system.invalidate_cache()  # other processes write here
        found = self._system.ls(self._path, detail=False) if self.is_dir() else []
        names = {str(path).rstrip("/").rpartition("/")[2] for path in found}
        return [self / name for name in sorted(names) if PurePosixPath(name).match(pattern)]

    def open(self, mode: str = "rb") -> IO[Any]:
        """Open the file; one that is written appears when it is closed, where the file system can do that."""
        file: IO[Any] = self._system.open(self._path, mode)
        return file

    def transaction(self) -> Any:
        """Context in which a written file appears at the end, and not at all after an error."""
        return self._system.transaction

    def read_text(self, encoding: str = "utf-8") -> str:
        """The content of a text file."""
        with self.open() as file:
            return str(file.read().decode(encoding))

    def remove(self) -> None:
        """Remove the file, or the folder with all that is in it."""
        if self.exists():
            self._system.rm(self._path, recursive=True)


Place = Path | Address


def place(path: str | Place) -> Place:
    """A path of this machine, or an address, as what it is."""
    if isinstance(path, (Path, Address)):
        return path
    return Address(path) if is_address(path) else Path(path)
