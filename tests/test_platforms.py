"""Systems other than Linux, imitated: Windows has no module or signal of POSIX, and starts worker processes anew."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.data.batches import loader
from lightning_sft.data.tokens import encode_rows as chunks
from lightning_sft.io import disk
from tests.helpers.processes import run

AS_ON_WINDOWS = """
import ctypes, os, pkgutil, signal, sys
import datasets, lightning.pytorch.cli, psutil, transformers  # what these need there is theirs
for name in ("fcntl", "grp", "pwd", "readline", "resource", "termios", "tty"):
    sys.modules[name] = None  # an import of it fails
for name in ("sysconf", "sched_getaffinity", "getuid"):
    delattr(os, name)
import lightning_sft, torch.distributed.checkpoint.state_dict_saver
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL"):
    delattr(signal, name)
for module in pkgutil.walk_packages(lightning_sft.__path__, "lightning_sft."):
    if module.name != "lightning_sft.__main__":
        __import__(module.name)
from lightning_sft.commands.doctor import facts
from lightning_sft.commands.plan.device import Device
assert facts()
print(Device.of("cpu", 1))
"""


def test_nothing_of_posix_is_needed_to_import_it_or_to_look_at_the_machine() -> None:
    printed = run([sys.executable, "-c", AS_ON_WINDOWS])
    assert "Device(name='CPU'" in printed


def test_the_disk_of_windows_is_synced_without_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def refuse_folders(path: Path, flags: int) -> Any:
        if path.is_dir():
            raise PermissionError(path)
        synced.append(path.name)
        return real(path, flags)

    real = disk.os.open
    monkeypatch.setattr(disk, "_ON_WINDOWS", True)
    monkeypatch.setattr(disk.os, "open", refuse_folders)
    (tmp_path / "a.ckpt").write_text("whole")
    disk.sync([tmp_path / "a.ckpt", tmp_path])
    assert synced == ["a.ckpt"]


def round_trip(made: DataLoader[Any]) -> Iterator[Any]:
    """What a loader gives in workers that are started anew: its data set and function go there as bytes."""
    sent = pickle.dumps((made.dataset, made.collate_fn))
    assert b"Trainer" not in sent
    dataset, collate = pickle.loads(sent)
    yield from DataLoader(dataset, batch_size=None, collate_fn=collate)


@pytest.mark.parametrize("settings", [{}, {"packing": "padded"}, {"streaming": True}], ids=str)
def test_what_workers_are_sent_under_spawn_is_whole_and_small(
    settings: dict[str, Any],
    pretrained: str,
    jsonl: Callable[..., str],
    rows: list[dict[str, str]],
    quiet_trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def losses() -> float:
        trainer = quiet_trainer(max_steps=2)
        data = SFTDataModule(train=jsonl(rows), tokens_per_batch=60, num_workers=0, cache=None, **settings)
        trainer.fit(SFTModule(pretrained, schedule="constant"), data)
        return float(trainer.callback_metrics["train/loss"])

    here = losses()
    for module in (chunks, loader):
        monkeypatch.setattr(module, "iterate", round_trip)
    assert losses() == here


def test_a_module_and_its_trainer_go_to_a_spawned_process(
    pretrained: str, jsonl: Callable[..., str], rows: list[dict[str, str]], quiet_trainer: Callable[..., Trainer]
) -> None:
    """As ``ddp_spawn`` sends them."""
    trainer, module = quiet_trainer(), SFTModule(pretrained)
    trainer.strategy._lightning_module = module
    sent = io.BytesIO()
    multiprocessing.reduction.ForkingPickler(sent).dump((trainer, module, SFTDataModule(train=jsonl(rows))))
    _, received, _ = pickle.loads(sent.getvalue())
    assert received.optimizer is module.optimizer


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_batches_of_started_workers_are_those_of_this_process(method: str, tmp_path: Path) -> None:
    run([sys.executable, "-m", "tests.helpers.starting", method, str(tmp_path)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks")
def test_after_ranks_that_are_forks_the_module_has_the_weights_that_they_trained(
    pretrained: str, tmp_path: Path
) -> None:
    run([sys.executable, "-m", "tests.helpers.forked", pretrained, str(tmp_path)])  # CUDA refuses forks of a fork
    kept = torch.load(tmp_path / "module.pt", weights_only=True)
    [path] = tmp_path.glob("*.ckpt")
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert kept
    assert all(torch.equal(parameter, saved[name]) for name, parameter in kept.items())
    said = (tmp_path / "said.txt").read_text(encoding="utf-8")
    assert said == "The fit ended."  # the processes that trained have told nobody where they saved
