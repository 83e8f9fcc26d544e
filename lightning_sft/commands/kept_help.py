"""The help of a verb, kept on disk: making it takes ten seconds of imports, mostly Lightning's, and reading it none."""

from __future__ import annotations

import hashlib
import io
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FOLDER = "~/.cache/lightning-sft/help"
_LIBRARIES = ("jsonargparse", "lightning", "torch", "transformers")  # whose classes and words are in it


def print_help(verb: str, make: Callable[[], object]) -> None:
    """Print the help of a verb, and exit as it does; it is made again when our code, a library or the width is another.

    Args:
        verb: Name of the verb.
        make: Function that prints the help and exits.

    Raises:
        SystemExit: With the exit code of the help.
    """
    path = Path(FOLDER).expanduser() / f"{verb}-{_key(verb)}.txt"
    with suppress(OSError, UnicodeDecodeError):
        if text := path.read_text(encoding="utf-8"):
            sys.stdout.write(text)
            sys.exit(0)
    text, code = captured(make)
    sys.stdout.write(text)
    if not code:
        _keep(path, text, verb)
    sys.exit(code)


def captured(make: Callable[[], object]) -> tuple[str, str | int | None]:
    """What a help prints to standard output, and its exit code.

    Args:
        make: Function that prints the help and exits.
    """
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            make()
    except SystemExit as end:
        return printed.getvalue(), end.code
    return printed.getvalue(), None


def _key(verb: str) -> str:
    """Digest of all that the help depends on; of our own files, their sizes and times."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    code = [(str(file), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]
    text = repr((verb, sys.version, shutil.get_terminal_size().columns, [_version(name) for name in _LIBRARIES], code))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _keep(path: Path, text: str, verb: str) -> None:
    """Write it in place of earlier ones; where it cannot be written, it is made each time."""
    from lightning_sft.io.disk import write
    from lightning_sft.types import InputError

    with suppress(OSError, InputError):
        for old in path.parent.glob(f"{verb}-*.txt"):
            old.unlink()
        write(path, text)
