"""Checkpoints at addresses of fsspec: saved, found, resumed from and removed like those of a local folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch.optim import AdamW

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks.checkpoint import SafeCheckpoint
from lightning_sft.callbacks.defaults import default_callbacks, find_last
from lightning_sft.checkpoints.background import refuse_own_writer
from lightning_sft.checkpoints.reading import INDEX, META, Checkpoint
from lightning_sft.checkpoints.writing import AtomicIO, finish, newest, partial_of, remove_checkpoint, sweep
from lightning_sft.io.address import Address
from lightning_sft.types import InputError
from tests.helpers.gradients import ROWS

WHERE = "memory://run/checkpoints"


@pytest.fixture
def memory() -> Iterator[Any]:
    """The file system in memory, empty."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


def fit(pretrained: str, trainer: Trainer, ckpt_path: Any = None) -> dict[str, torch.Tensor]:
    module = SFTModule(pretrained, optimizer=partial(AdamW, lr=1e-2), schedule="constant", warmup=0.0)
    trainer.fit(module, SFTDataModule(train=ROWS, tokens_per_batch=100), ckpt_path=ckpt_path)
    return dict(module.state_dict())


def steps() -> list[int]:
    return sorted(Checkpoint(path).step for path in Address(WHERE).glob("*.ckpt"))


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.usefixtures("memory")
def test_a_run_resumes_to_the_bit_from_an_address_where_it_keeps_the_last_few(
    pretrained: str, quiet_trainer: Callable[..., Trainer], in_background: bool
) -> None:
    def run(max_steps: int, where: str, ckpt_path: Any = None) -> dict[str, torch.Tensor]:
        saver = SafeCheckpoint(where, 2, None, in_background=in_background)
        trainer = quiet_trainer(max_steps=max_steps, max_epochs=-1, enable_checkpointing=True, callbacks=[saver])
        return fit(pretrained, trainer, ckpt_path)

    whole = run(8, "memory://whole")
    run(6, WHERE)
    assert steps()[-1] == 6
    last = find_last("runs/none", [SimpleNamespace(init_args={"dirpath": WHERE})], pretrained, True)
    assert last == str(newest([WHERE]))
    assert Checkpoint(str(last)).step == 6
    resumed = run(8, WHERE, last)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert steps()[0] == 6
    assert steps()[-1] == 8
    assert len(steps()) <= 3
    saved = Checkpoint(str(newest([WHERE]))).weights()
    assert all(torch.equal(saved[name], resumed[name]) for name in saved)


def test_a_file_at_an_address_is_complete_or_not_there(memory: Any) -> None:
    def cut(checkpoint: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("connection lost")

    path = f"{WHERE}/resume-step=3.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", cut)
        with pytest.raises(InputError, match=r"step=3.ckpt cannot be written: connection lost"):
            AtomicIO().save_checkpoint({}, path)
    assert not memory.exists(path)
    AtomicIO().save_checkpoint({"pytorch-lightning_version": "2", "callbacks": {}, "global_step": 3}, path)
    with Address(f"{WHERE}/resume-step=4.ckpt").open("wb") as file:  # of a file system without transactions
        file.write(memory.cat(path)[:400])
    with pytest.warns(UserWarning, match=r"Skipping memory://.*step=4.ckpt"):
        assert newest([WHERE]) == path


@pytest.mark.usefixtures("memory")
def test_a_folder_at_an_address_counts_from_its_index_on_and_without_it_is_removed_at_the_next_start() -> None:
    folder = Address(WHERE) / "resume-step=4.ckpt"
    folder.mkdir()
    with (folder / META).open("wb") as file:
        torch.save({"callbacks": {}, "global_step": 4}, file)
    with pytest.warns(UserWarning, match=r"not a complete checkpoint: it has no .metadata"):
        assert newest([WHERE]) is None
    whole, file = Address(WHERE) / "resume-step=5.ckpt", Address(WHERE) / "resume-step=6.ckpt"
    assert partial_of(whole) == whole
    whole.mkdir()
    for address in (whole / INDEX, file):
        with address.open("wb") as opened:
            opened.write(b"1")
    sweep(Address(WHERE), "*.ckpt")
    assert not folder.exists()
    assert (whole / INDEX).exists()
    assert file.exists()
    finish(whole)  # it is where it is
    remove_checkpoint(whole)
    assert not whole.exists()


def test_what_an_address_cannot_be_used_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'nowhere://a' is not available: Protocol not known: nowhere"):
        Address("nowhere://a")
    with pytest.raises(InputError, match=r"dirpath='s3://b'\) needs a single device, ddp or fsdp2; FSDPStrategy"):
        refuse_own_writer(FSDPStrategy(), "SafeCheckpoint(dirpath='s3://b')")
    with pytest.raises(InputError, match=r"default_root_dir=s3://b is an address; .*Set the dirpath of .*Safe"):
        default_callbacks({"default_root_dir": "s3://b"}, True)
    assert SafeCheckpoint(f"file://{tmp_path}").dirpath == str(tmp_path.resolve())
