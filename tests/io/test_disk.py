from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_sft.io.disk import append, rows_of, sync, whole_folder, write
from lightning_sft.types import InputError


@contextmanager
def full_disk() -> Iterator[None]:
    """A limit on the size of files stands for the disk; only here, since the log of the tests may be a longer one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_files_and_folders_are_asked_to_be_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("all of it")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    sync([file, tmp_path])
    assert synced == [file.stat().st_ino, tmp_path.stat().st_ino]


def test_on_a_full_disk_a_file_stays_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write(path, "before")
    with full_disk(), pytest.raises(InputError, match=r"run.json cannot be written: File too large"):
        write(path, "x" * 3000)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_on_a_full_disk_no_half_line_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    append(path, "{}\n" * 500)
    with full_disk(), pytest.raises(InputError, match=r"samples.jsonl cannot be written: File too large"):
        append(path, "{}\n" * 500)  # of which some would still fit
    assert path.read_text() == "{}\n" * 500


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_of_a_folder_have_the_permissions_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "out") as folder:
            save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
            (folder / "config.json").write_text("{}")
            (folder / "inner").mkdir()
            (folder / "inner" / "a").touch(0o600)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(("model.safetensors", "config.json", "a"), 0o666 & ~umask)


def test_damaged_lines_are_skipped_by_name(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\n\xff\xfe\n\0\0\n[1]\n{"step": 2}\n{"step": 3}')
    with pytest.warns(UserWarning, match="Skipping line") as warned:
        rows = list(rows_of(path))
    assert rows == [({"step": 1}, 12), ({"step": 2}, path.stat().st_size - 11)]  # the last has no end
    numbers = [str(warning.message).split(f" of {path}")[0] for warning in warned]
    assert numbers == [f"Skipping line {number}" for number in (2, 3, 4, 5)]
