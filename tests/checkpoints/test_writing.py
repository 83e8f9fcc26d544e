from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_sft.checkpoints import writing
from lightning_sft.checkpoints.writing import (
    AtomicIO,
    bytes_of_checkpoint,
    check_disk,
    checkpoint_of,
    finish,
    folders_of,
    newest,
    step_of,
    sweep,
    write_whole,
)
from lightning_sft.io.disk import hidden, publish
from lightning_sft.types import InputError


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint of a step; the clock goes backwards from one to the next."""

    def make(name: str, step: int = 0, **more: Any) -> Path:
        path = tmp_path / name
        saved = {"callbacks": {}, "state_dict": {"w": torch.rand(1000)}, "global_step": step, **more}
        AtomicIO().save_checkpoint(saved, path)
        os.utime(path, (1e9 - step, 1e9 - step))
        return path

    return make


def test_the_newest_good_checkpoint_is_found_and_those_cut_short_are_said(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    write("a.ckpt", 9)
    good = write("b.ckpt", 10)
    cut = write("c.ckpt", 11)
    cut.write_bytes(cut.read_bytes()[:-100])
    (tmp_path / "0.ckpt").touch()
    (tmp_path / "shards.ckpt").mkdir()  # of a distributed one whose index has not been written
    with pytest.warns(UserWarning, match=r"Skipping") as warned:
        assert newest([tmp_path, tmp_path / "missing"]) == good
    assert {Path(str(w.message).split()[1].rstrip(":")).name for w in warned} == {"0.ckpt", "c.ckpt", "shards.ckpt"}


def test_a_checkpoint_of_the_weights_alone_is_not_gone_on_from(write: Callable[..., Path], tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "global_step": 4}, tmp_path / "weights.ckpt")
    assert newest([tmp_path]) is None
    assert newest([tmp_path], resumable=False) == tmp_path / "weights.ckpt"


def test_of_runs_that_a_logger_has_numbered_the_last_is_taken_whatever_its_step(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("version_9/checkpoints", "version_10/checkpoints"):
        (tmp_path / "lightning_logs" / name).mkdir(parents=True)
    write("lightning_logs/version_9/checkpoints/long.ckpt", 900)
    later = write("lightning_logs/version_10/checkpoints/short.ckpt", 5)
    assert newest(folders_of(tmp_path)) == later


def test_what_is_beside_numbered_runs_comes_before_them(write: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("checkpoints", "lightning_logs/version_1/checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    write("lightning_logs/version_1/checkpoints/long.ckpt", 900)
    own = write("checkpoints/short.ckpt", 5)
    assert newest(folders_of(tmp_path)) == own
    own.unlink()
    assert newest(folders_of(tmp_path)) == tmp_path / "lightning_logs/version_1/checkpoints/long.ckpt"


def test_a_checkpoint_that_says_where_its_run_is_comes_before_one_that_does_not(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    torch.save({"callbacks": {}, "state_dict": {}}, tmp_path / "a.ckpt")  # of no step
    write("b.ckpt", 0)
    said = write("c.ckpt", 0, lightning_sft_place={"epoch": 0, "is_validated": False})
    assert newest([tmp_path]) == said
    said.unlink()
    assert newest([tmp_path]) == tmp_path / "b.ckpt"


def test_of_two_at_a_step_the_one_after_its_validation_is_taken(write: Callable[..., Path], tmp_path: Path) -> None:
    after = write("a.ckpt", 4, lightning_sft_place={"epoch": 1, "is_validated": True})
    write("b.ckpt", 4, lightning_sft_place={"epoch": 1, "is_validated": False})
    write("c.ckpt", 4, lightning_sft_place={"epoch": 0, "is_validated": True})
    assert newest([tmp_path]) == after


def test_the_folder_of_a_run_stands_for_its_newest_checkpoint(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "run" / "lightning_logs" / "version_0" / "checkpoints").mkdir(parents=True)
    assert checkpoint_of(tmp_path / "run") == str(tmp_path / "run")  # it has none yet, as has a model's folder
    write("run/lightning_logs/version_0/checkpoints/a.ckpt", 10)
    newer = write("run/checkpoints/b.ckpt", 20)
    assert checkpoint_of(tmp_path / "run") == str(newer)
    assert checkpoint_of("owner/name") == "owner/name"
    (tmp_path / "run" / ".metadata").touch()  # a distributed checkpoint is one itself
    assert checkpoint_of(tmp_path / "run") == str(tmp_path / "run")


def test_a_folder_of_plain_checkpoints_stands_for_its_newest_too(write: Callable[..., Path], tmp_path: Path) -> None:
    for folder in ("plain", "run/version_0/checkpoints", "run/version_1/checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    write("plain/epoch=0-step=9.ckpt", 9)
    newer = write("plain/epoch=1-step=18.ckpt", 18)
    assert checkpoint_of(tmp_path / "plain") == str(newer)
    write("run/version_0/checkpoints/a.ckpt", 9)
    last = write("run/version_1/checkpoints/b.ckpt", 3)
    assert checkpoint_of(tmp_path / "run") == str(last)  # numbered by a logger, in a folder of the user's choice


def test_a_folder_of_several_runs_is_refused_with_their_names(write: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
    only = write("runs/one/checkpoints/a.ckpt", 1)
    assert checkpoint_of(tmp_path / "runs") == str(only)
    write("runs/two/checkpoints/a.ckpt", 1)
    with pytest.raises(InputError, match=r"runs holds the checkpoints of several runs. .*one/checkpoints, .*two"):
        checkpoint_of(tmp_path / "runs")


def test_of_many_runs_the_first_are_named(write: Callable[..., Path], tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / "runs" / name).mkdir(parents=True)
        write(f"runs/{name}/a.ckpt", 1)
    with pytest.raises(InputError, match=r"one: [^,]*/a, [^,]*/b, [^,]*/c, [^,]*/d, [^,]*/e, …\.$"):
        checkpoint_of(tmp_path / "runs")
    (tmp_path / "runs/f/a.ckpt").unlink()
    with pytest.raises(InputError, match=r"/d, [^,]*/e\.$"):
        checkpoint_of(tmp_path / "runs")


@pytest.mark.parametrize("folder", ["checkpoints", "best"])
def test_weights_alone_stand_for_a_run_that_has_no_more(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / "weights.ckpt"
    torch.save({"state_dict": {}, "global_step": 4}, path)
    assert checkpoint_of(tmp_path) == str(path)


def test_folders_of_a_checkpoint_are_made(write: Callable[..., Path], tmp_path: Path) -> None:
    assert newest([write("a/b/c.ckpt", 1).parent]) == tmp_path / "a/b/c.ckpt"
    assert newest([write("a/b/d.ckpt", 2).parent]) == tmp_path / "a/b/d.ckpt"


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_whatever_torch_raises_where_it_cannot_write_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def refuse(*arguments: Any) -> None:
        raise kind("no room")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(InputError, match=r"a.ckpt cannot be written: no room. Those before it are intact"):
        AtomicIO().save_checkpoint({}, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"b.ckpt cannot be written: .*No such file"):
        finish(tmp_path / "b.ckpt")


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([1], r"is not a checkpoint of Lightning, but not a dictionary\. Expected a file saved by fit"),
        ({"a": 1, "b": 2}, r"is not a checkpoint of Lightning, but a dictionary of a, b\."),
        ({"pytorch-lightning_version": "2"}, r"is not a checkpoint of a module: it has no 'state_dict'"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, saved: Any, message: str) -> None:
    torch.save(saved, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=message):
        AtomicIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=True)


def test_a_checkpoint_that_was_written_is_read(tmp_path: Path) -> None:
    saved = {"pytorch-lightning_version": "2", "state_dict": {}, "global_step": 3}
    AtomicIO().save_checkpoint(saved, tmp_path / "a.ckpt")
    assert AtomicIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=True) == saved
    with pytest.raises(TypeError, match="storage_options"):
        AtomicIO().save_checkpoint(saved, tmp_path / "b.ckpt", {"a": 1})


def test_lightnings_writer_is_replaced_and_one_of_the_users_own_kept() -> None:
    class Own(TorchCheckpointIO):
        pass

    found = [SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=io)) for io in (TorchCheckpointIO(), Own())]
    for trainer in found:
        write_whole(trainer)  # type: ignore[arg-type]  # all that it looks at
    assert [type(trainer.strategy.checkpoint_io) for trainer in found] == [AtomicIO, Own]


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


def test_a_disk_with_exactly_the_room_of_a_checkpoint_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(3, 5)  # 20 parameters
    module.bias.requires_grad = False
    size = bytes_of_checkpoint(module.to(torch.bfloat16))
    assert size == 15 * (2 + 8)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    check_disk(tmp_path, size)
    with pytest.raises(InputError, match="Make room"):
        check_disk(tmp_path, size + 1)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: SimpleNamespace(free=2.5e9))
    with pytest.raises(InputError, match=r"needs about 5\.0 GB, but .* has 2\.5 GB left"):
        check_disk(tmp_path, 5 * 10**9)


def test_only_names_of_ours_have_a_step() -> None:
    names = ["resume-epoch=1-step=250.ckpt", "resume-step=7.ckpt", "resume-step=7.ckpt.x", "a-resume-step=7.ckpt"]
    assert [step_of(Path("run", name)) for name in names] == [250, 7, None, None]


@pytest.mark.parametrize("root", ["runs/b", "{tmp_path}/runs/b"])
def test_a_run_with_a_folder_of_its_own_is_another_run(tmp_path: Path, root: str) -> None:
    for name, config in (("runs/b", root.format(tmp_path=tmp_path)), ("lightning_logs/version_0", None)):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        config_file = tmp_path / name / "config.yaml"
        config_file.write_text(yaml.safe_dump({"trainer": {"default_root_dir": config}}), encoding="utf-8")
    names = [folder.relative_to(tmp_path).as_posix() for folder in folders_of(tmp_path)]
    assert names == ["checkpoints", "lightning_logs/version_0/checkpoints"]
    assert folders_of(tmp_path / "runs" / "b")[0].is_dir()


@pytest.mark.parametrize(
    "config",
    [
        None,
        b"\xff",
        b"trainer: [",
        b"5",
        b"a: 1",
        b"trainer: {default_root_dir: elsewhere}",
        b"trainer: {default_root_dir: .}",
    ],
)
def test_a_folder_that_does_not_say_that_a_run_is_its_own_belongs_to_the_one_above(
    tmp_path: Path, config: bytes | None
) -> None:
    folder = tmp_path / "logs" / "mine"
    (folder / "checkpoints").mkdir(parents=True)
    if config is not None:
        (folder / "config.yaml").write_bytes(config)
    assert folders_of(tmp_path) == [tmp_path / "checkpoints", folder / "checkpoints"]


def test_checkpoints_of_loggers_are_looked_for_too(tmp_path: Path) -> None:
    (tmp_path / "lightning_logs" / "version_3" / "checkpoints").mkdir(parents=True)
    names = [folder.relative_to(tmp_path).as_posix() for folder in folders_of(tmp_path)]
    assert names == ["checkpoints", "lightning_logs/version_3/checkpoints"]


@pytest.mark.parametrize("path", [True, 5, ["last"]])
def test_what_is_no_path_of_a_checkpoint_is_refused_by_its_argument(path: Any) -> None:
    with pytest.raises(InputError, match=r"ckpt_path is .*; expected the path of a checkpoint, last or best"):
        AtomicIO().load_checkpoint(path)
