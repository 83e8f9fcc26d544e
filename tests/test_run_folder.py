from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sft.run_folder import AtomicIO, check_disk, checkpoint_of, folders_of, hidden, newest, publish, sweep
from lightning_sft.types import InputError


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint that is so many seconds old."""

    def make(name: str, age: int = 0, **more: Any) -> Path:
        path = tmp_path / name
        AtomicIO().save_checkpoint({"callbacks": {}, "state_dict": {"w": torch.rand(1000)}, **more}, path)
        os.utime(path, (1e9 - age, 1e9 - age))
        return path

    return make


def test_the_newest_good_checkpoint_is_found_and_those_cut_short_are_said(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    write("a.ckpt", 30)
    good = write("b.ckpt", 20)
    cut = write("c.ckpt", 10)
    cut.write_bytes(cut.read_bytes()[:-100])
    os.utime(cut, (1e9, 1e9))
    (tmp_path / "d.ckpt").touch()
    (tmp_path / "shards.ckpt").mkdir()  # of a distributed one whose index has not been written
    with pytest.warns(UserWarning, match=r"is passed over") as warned:
        assert newest([tmp_path, tmp_path / "missing"]) == good
    assert {Path(str(w.message).split()[0]).name for w in warned} == {"c.ckpt", "d.ckpt", "shards.ckpt"}


def test_a_checkpoint_of_the_weights_alone_is_not_gone_on_from(write: Callable[..., Path], tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "weights.ckpt")
    assert newest([tmp_path]) is None


def test_the_folder_of_a_run_stands_for_its_newest_checkpoint(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "run" / "lightning_logs" / "version_0" / "checkpoints").mkdir(parents=True)
    assert checkpoint_of(tmp_path / "run") == str(tmp_path / "run")  # it has none yet, as has a model's folder
    write("run/lightning_logs/version_0/checkpoints/a.ckpt", 20)
    newer = write("run/checkpoints/b.ckpt", 10)
    assert checkpoint_of(tmp_path / "run") == str(newer)
    assert checkpoint_of("owner/name") == "owner/name"
    (tmp_path / "run" / ".metadata").touch()  # a distributed checkpoint is one itself
    assert checkpoint_of(tmp_path / "run") == str(tmp_path / "run")


def test_a_full_disk_leaves_what_was_there(write: Callable[..., Path], tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    path = write("a.ckpt", number=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot be written: .*Those before it are intact"):
            AtomicIO().save_checkpoint({"w": torch.rand(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.load(path, weights_only=True)["number"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_nothing_is_under_the_name_before_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "shards.ckpt", []
    hidden(path).mkdir()
    (hidden(path) / "shard").write_text("1")
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    publish(path)
    assert synced == [("shard", False), (hidden(path).name, False), (tmp_path.name, True)]
    assert (path / "shard").read_text() == "1"
    hidden(path).mkdir()
    publish(path)  # once more, in place of the first
    assert not list(path.iterdir())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_a_killed_process_has_left_is_swept_away(tmp_path: Path) -> None:
    hidden(tmp_path / "a.ckpt").mkdir()
    hidden(tmp_path / "b.ckpt").touch()
    (tmp_path / "c.ckpt").touch()
    sweep(tmp_path, "*.ckpt*")
    assert [p.name for p in tmp_path.iterdir()] == ["c.ckpt"]


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    check_disk(tmp_path, 1000)
    with pytest.raises(InputError, match=r"needs about 1000000000.0 GB, but .* Make room, or set"):
        check_disk(tmp_path, 10**18)


def test_checkpoints_of_loggers_are_looked_for_too(tmp_path: Path) -> None:
    (tmp_path / "lightning_logs" / "version_3" / "checkpoints").mkdir(parents=True)
    names = [folder.relative_to(tmp_path).as_posix() for folder in folders_of(tmp_path)]
    assert names == ["checkpoints", "lightning_logs/version_3/checkpoints"]
