"""Files of remote file systems, by fsspec, and read as those of this machine are: s3://, gs://, https://, hf://."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from lightning_sft.types import InputError

_PROTOCOL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class RemoteFile:
    """A file by its address, with the methods of :class:`pathlib.Path` that reading takes.

    Args:
        url: Address of the file.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        return self.url

    @property
    def suffixes(self) -> list[str]:
        """Suffixes of its name."""
        return PurePosixPath(urlsplit(self.url).path).suffixes

    @property
    def suffix(self) -> str:
        """The last suffix of its name."""
        return PurePosixPath(urlsplit(self.url).path).suffix

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file, opened for reading."""
        system, path = _system(self.url)
        return cast(BinaryIO, system.open(path, mode))

    def stat(self) -> SimpleNamespace:
        """Its size in bytes, ``st_size``; 0 where the server does not say it."""
        system, path = _system(self.url)
        return SimpleNamespace(st_size=system.size(path) or 0)


File = Path | RemoteFile
"""A data file, of this machine or another."""


def is_remote(name: str) -> bool:
    """Whether a name is an address with a protocol.

    >>> is_remote("s3://bucket/train.jsonl"), is_remote("data/train.jsonl")
    (True, False)
    """
    return _PROTOCOL.match(name) is not None


def matches(url: str) -> list[str]:
    """The addresses that a glob stands for, in order; or the address itself, if there is a file or folder.

    Raises:
        InputError: When its protocol is not known or its package is missing, or the server does not answer.
    """
    system, path = _system(url)
    with _one_error(url):
        if any(sign in path for sign in "*[") and not url.startswith("http"):  # there, they may belong to the address
            return sorted(map(system.unstrip_protocol, system.glob(path)))
        return [url] if system.exists(path) else []


def paths_below(url: str) -> list[str] | None:
    """The paths of all files below a folder; ``None`` where the address is not that of a folder.

    Raises:
        InputError: As :func:`matches`.
    """
    system, path = _system(url)
    with _one_error(url):
        if url.startswith("http") or not system.isdir(path):  # a web server has pages, not folders
            return None
        return [PurePosixPath(file).relative_to(path).as_posix() for file in system.find(path)]


@contextmanager
def _one_error(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the network, the server, the package of the protocol
        raise InputError(f"{url!r} cannot be read: {error}") from error


def _system(url: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    with _one_error(url):
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
        return system, str(path)
