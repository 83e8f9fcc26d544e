from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from lightning_sft.checkpoints.run_lock import LOCK_FILE, FolderLock, _owner
from lightning_sft.types import InputError

Make = Callable[..., Trainer]


def other_process(work: Callable[[], None]) -> int:
    """A process that does it and then waits to be killed; it is left alone when the work is done."""
    told, tell = os.pipe()
    process = os.fork()
    if not process:
        try:
            work()
            os.write(tell, b"!")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(tell)
    assert os.read(told, 1) == b"!"
    os.close(told)
    return process


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_a_folder_in_use_is_refused_with_its_owner_and_free_when_that_is_killed(
    quiet_trainer: Make, tmp_path: Path
) -> None:
    owner = other_process(lambda: FolderLock().take(quiet_trainer(), tmp_path / "run"))
    lock, trainer = FolderLock(), quiet_trainer()
    try:
        with pytest.raises(InputError, match=rf"run is in use: process {owner} on .*separate folder"):
            lock.take(trainer, tmp_path / "run")
    finally:
        kill(owner)
    assert (tmp_path / "run" / LOCK_FILE).is_file()  # left behind
    lock.take(trainer, tmp_path / "run")
    lock.release()
    assert not list((tmp_path / "run").iterdir())


def test_workers_of_a_killed_owner_do_not_hold_its_folder(quiet_trainer: Make, tmp_path: Path) -> None:
    path = tmp_path / "worker"

    def work() -> None:
        FolderLock().take(quiet_trainer(), tmp_path)
        path.write_text(str(other_process(lambda: None)))

    kill(other_process(work))
    lock = FolderLock()
    try:
        lock.take(quiet_trainer(), tmp_path)
        os.kill(int(path.read_text()), 0)  # it is still there
    finally:
        lock.release()
        os.kill(int(path.read_text()), signal.SIGKILL)


def test_callbacks_of_a_run_share_its_folder_until_the_last_lets_go(quiet_trainer: Make, tmp_path: Path) -> None:
    locks, trainer = [FolderLock(), FolderLock()], quiet_trainer()
    for lock in locks:
        lock.take(trainer, tmp_path)
    locks[0].release()

    def refused() -> None:
        FolderLock._held.clear()  # as in a process that was not forked from this one
        with pytest.raises(InputError, match="is in use"):
            FolderLock().take(trainer, tmp_path)

    kill(other_process(refused))
    locks[1].release()
    assert not FolderLock._held
    assert not list(tmp_path.iterdir())
    kill(other_process(lambda: FolderLock().take(trainer, tmp_path)))


def test_folders_that_were_made_for_locks_go_with_the_last_of_them(quiet_trainer: Make, tmp_path: Path) -> None:
    locks, trainer = [FolderLock(), FolderLock()], quiet_trainer()
    for lock, name in zip(locks, ("one", "other"), strict=True):
        lock.take(trainer, tmp_path / "runs" / name / "checkpoints")
    (tmp_path / "runs" / "other" / "config.yaml").touch()
    locks[0].release()
    assert (tmp_path / "runs" / "one" / "checkpoints").is_dir()  # the fit has not ended
    locks[1].release()
    assert [path.name for path in sorted((tmp_path / "runs").rglob("*"))] == ["other", "config.yaml"]


def test_a_file_system_without_locks_is_said_to_have_none(
    quiet_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl", reason="a system without locks warns of none")

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    lock = FolderLock()
    with pytest.warns(UserWarning, match="is not locked, as its file system has no locks: .*No locks available"):
        lock.take(quiet_trainer(), tmp_path)
    lock.release()


def test_a_folder_that_cannot_be_written_is_one_message(quiet_trainer: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write to its folder .*file/run: Not a directory. Set trainer"):
        FolderLock().take(quiet_trainer(), tmp_path / "file" / "run")


@pytest.mark.parametrize("text", ["", '{"process":', '{"process": 1}', "[]"])
def test_an_owner_that_has_not_yet_written_its_name_is_another_process(text: str) -> None:
    assert _owner(text) == "another process"
