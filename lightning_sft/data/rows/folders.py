"""Which files of a folder are its training data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from lightning_sft.data.rows.files import kind_of
from lightning_sft.io.words import listed
from lightning_sft.types import InputError

_NO_DATA = {"config.json", "dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
_LISTED = 10
_HELD_OUT = re.compile(
    r"(?:^|[-._ 0-9/])(?:validation|valid|val|dev|test|testing|eval|evaluation)(?:$|[-._ 0-9/])", re.IGNORECASE
)  # the words that datasets knows


@dataclass(frozen=True)
class Folder:
    """The data files of a folder, or those that a glob stands for, of which none is left out.

    Args:
        name: Name of the folder, or the glob.
        read: Paths of the files that are read, below the folder.
        left_out: Paths of the data files that are not.
        held_out: Paths of the data files that are for validation or testing, as their names say.
    """

    name: str
    read: list[str]
    left_out: list[str]
    held_out: list[str]

    def check(self, split: str) -> None:
        """Refuse to train on what is for testing, and to validate or test on what is for training.

        Args:
            split: What the folder is read for, such as ``train``.

        Raises:
            InputError: When its files are for something else, as their names say.
        """
        if split == "train" and self.read == self.held_out:
            raise InputError(
                f"data.train: all data files in the folder {self.name!r} are for validation or testing, as their names "
                f"say ({listed(self.held_out, _LISTED)}). To train on them, name the files."
            )
        if split == "train" and (mixed := sorted(set(self.held_out) & set(self.read))):
            raise InputError(
                f"data.train: {self.name!r} stands for files for training and others, as their names say "
                f"({listed(mixed, _LISTED)}). Name the files, or give the folder, of which those others are left out."
            )
        if split in ("val", "test") and set(self.held_out) - set(self.read):
            raise InputError(
                f"data.{split}: the folder {self.name!r} has files for training and others "
                f"({listed(self.held_out, _LISTED)}). Name the files to evaluate on."
            )

    def __str__(self) -> str:
        more = f", left out {listed(self.left_out, _LISTED)}" if self.left_out else ""
        return f"of the folder {self.name!r}, read {listed(self.read, _LISTED)}{more}."


def sort_out(name: str, paths: Sequence[str]) -> Folder:
    """The files of a folder that are read, and the data files that are left out.

    Hidden files and folders are no data, nor are descriptions of a data set. Files for validation or testing, as their
    names say, are read where there are no others. Plain texts are read where nothing else is: they may be a README.

    Args:
        name: Name of the folder.
        paths: Paths of all files below it, with ``/`` between their parts.

    >>> folder = sort_out("data", ["train.jsonl", "test.jsonl", ".cache/a.jsonl", "LICENSE.txt"])
    >>> folder.read, folder.left_out
    (['train.jsonl'], ['LICENSE.txt', 'test.jsonl'])
    """
    data = sorted(path for path in paths if _is_data(path))
    found = [path for path in data if kind_of(PurePath(path)) != ".txt"] or data
    held_out = [path for path in found if _HELD_OUT.search(path)]
    read = sorted(set(found) - set(held_out)) or found
    return Folder(name, read, sorted(set(data) - set(read)), held_out)


def of_glob(name: str, paths: Sequence[str]) -> Folder:
    """The files that a glob stands for.

    >>> of_glob("data/*", ["data/train.jsonl", "data/test.jsonl"]).held_out
    ['data/test.jsonl']
    """
    begin = len(re.split(r"[*?\[]", name)[0].rpartition("/")[0])
    return Folder(name, list(paths), [], [path for path in paths if _HELD_OUT.search(path[begin:])])


def _is_data(path: str) -> bool:
    parts = PurePath(path).parts
    is_hidden = any(part.startswith((".", "__")) for part in parts)
    return not is_hidden and parts[-1] not in _NO_DATA and kind_of(PurePath(path)) is not None
