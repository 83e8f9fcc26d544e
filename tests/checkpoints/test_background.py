"""Checkpoints that a thread writes while training continues: what they hold, and what waits for them."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy
from torch.optim import AdamW

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import saving
from lightning_sft.callbacks.checkpoint import SafeCheckpoint
from lightning_sft.callbacks.preempt import Preempt, Preempted
from lightning_sft.callbacks.record import RunRecord
from lightning_sft.checkpoints import background
from lightning_sft.checkpoints.background import BackgroundWriter, HostBuffers
from lightning_sft.checkpoints.resume import POSITION_KEY
from lightning_sft.checkpoints.writing import AtomicIO
from lightning_sft.types import InputError

Make = Callable[..., Trainer]


class HeldIO(AtomicIO):
    """Writes nothing until it is released; counts writes under way."""

    def __init__(self) -> None:
        self.released, self.writing, self.most = threading.Event(), 0, 0

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.writing += 1
        self.most = max(self.most, self.writing)
        assert self.released.wait(60)
        super().save_checkpoint(*args, **kwargs)
        self.writing -= 1


class FailingIO(AtomicIO):
    """The first write fails."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")


class AtStep(Callback):
    """Does something when a step begins."""

    def __init__(self, step: int, do: Callable[[Trainer], object]) -> None:
        self.step, self.do = step, do

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.do(trainer)


@pytest.fixture
def fit(pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]]) -> Callable[..., Trainer]:
    def run(*callbacks: Any, ckpt_path: Any = None, **settings: Any) -> Trainer:
        trainer = quiet_trainer(enable_checkpointing=True, callbacks=list(callbacks), **{"max_epochs": 1, **settings})
        module = SFTModule(pretrained, optimizer=partial(AdamW, lr=1e-2), schedule="constant", warmup=0.0)
        trainer.fit(module, SFTDataModule(train=rows, tokens_per_batch=40), ckpt_path=ckpt_path)  # 12 steps
        return trainer

    return run


def saver(folder: Path, every: int | None = 3, **settings: Any) -> SafeCheckpoint:
    return SafeCheckpoint(folder, every, None, **{"in_background": True, **settings})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix == ".ckpt"}


def equal(a: Any, b: Any) -> bool:
    """Whether two checkpoints have the same values, to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def test_steps_are_taken_while_a_checkpoint_is_written_and_it_has_the_values_of_its_own_step(
    fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    fit(saver(tmp_path / "inline", in_background=False, keep_last=9))
    io, seen = HeldIO(), list[set[str]]()

    def release(trainer: Trainer) -> None:  # two steps after the save
        seen.append(names(tmp_path / "held"))
        io.released.set()

    fit(AtStep(5, release), saver(tmp_path / "held", keep_last=9), plugins=[io])
    assert seen == [set()]
    assert names(tmp_path / "held") == names(tmp_path / "inline")
    for name in names(tmp_path / "held"):
        inline, held = (torch.load(tmp_path / folder / name, weights_only=True) for folder in ("inline", "held"))
        assert inline.keys() == held.keys()
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops", POSITION_KEY):  # others have times
            assert equal(inline[key], held[key])


def test_one_checkpoint_is_written_at_a_time_and_the_last_complete_one_stays_meanwhile(
    fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    io, seen = HeldIO(), list[set[str]]()
    io.released.set()

    def look(trainer: Trainer) -> None:  # while that of step 6 is held
        seen.append(names(tmp_path))
        io.released.set()

    hold = AtStep(5, lambda trainer: io.released.clear())
    trainer = fit(hold, AtStep(7, look), saver(tmp_path, keep_last=1), plugins=[io])
    assert seen == [{"resume-epoch=0-step=3.ckpt"}]
    assert io.most == 1
    assert names(tmp_path) == {f"resume-epoch=0-step={trainer.global_step}.ckpt"}


def test_the_second_waits_until_the_first_is_on_disk(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    io = HeldIO()
    threading.Timer(1.0, io.released.set).start()
    fit(saver(tmp_path, every=1, keep_last=99), plugins=[io])
    assert io.most == 1
    assert len(names(tmp_path)) >= 10


@pytest.mark.parametrize("every", [2, None], ids=["within an epoch", "at the end of the fit"])
def test_an_error_of_the_thread_ends_training_with_one_message(
    fit: Callable[..., Trainer], tmp_path: Path, every: int | None
) -> None:
    message = r"The checkpoint .*step=.*ckpt cannot be written: No space left on device. Those before it are intact."
    with pytest.raises(InputError, match=message):
        fit(saver(tmp_path, every), plugins=[FailingIO()])
    assert not names(tmp_path)


def test_a_failed_write_ends_training_before_the_next_checkpoint_is_due(
    fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    steps: list[int] = []

    def wait_for_failure(trainer: Trainer) -> None:
        [callback] = trainer.checkpoint_callbacks
        while not callback._writer.has_failed:
            time.sleep(0.01)

    after = [AtStep(3, wait_for_failure), *(AtStep(step, lambda t: steps.append(t.global_step)) for step in (4, 5, 6))]
    with pytest.raises(InputError, match="cannot be written"):
        fit(*after, saver(tmp_path, every=2), plugins=[FailingIO()])
    assert steps == []  # the third step was the last; the next checkpoint would be due after the fourth


def test_the_record_names_a_run_as_saved_only_when_its_checkpoint_is_complete(
    fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    io, seen = HeldIO(), list[bool]()

    def saved() -> bool:
        return bool(json.loads((tmp_path / "run.json").read_text())["saved"])

    def release(trainer: Trainer) -> None:
        seen.append(saved())
        io.released.set()

    fit(AtStep(5, release), RunRecord(tmp_path), saver(tmp_path / "checkpoints"), plugins=[io])
    assert seen == [False]
    assert saved()


def test_an_error_in_training_waits_for_the_checkpoint_being_written(
    fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    io = HeldIO()

    class Release(Callback):
        def on_exception(self, *args: Any) -> None:
            assert not names(tmp_path)
            io.released.set()

    def fail(trainer: Trainer) -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fit(Release(), AtStep(4, fail), saver(tmp_path), plugins=[io])
    assert names(tmp_path) == {"resume-epoch=0-step=3.ckpt"}


def test_a_signal_waits_for_the_checkpoint_being_written_and_for_its_own(
    fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    io = HeldIO()
    threading.Timer(1.0, io.released.set).start()
    send = AtStep(3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted):
        fit(Preempt(), send, saver(tmp_path), plugins=[io])
    assert names(tmp_path) == {"resume-epoch=0-step=3.ckpt", "resume-epoch=0-step=4.ckpt"}


def test_a_run_that_saved_in_the_background_resumes_to_the_bit(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    whole = fit(saver(tmp_path / "whole"))
    fit(saver(tmp_path / "cut"), max_epochs=-1, max_steps=6)
    resumed = fit(saver(tmp_path / "cut"), ckpt_path="last")
    assert resumed.global_step == whole.global_step
    assert equal(dict(resumed.lightning_module.state_dict()), dict(whole.lightning_module.state_dict()))


def test_too_little_host_memory_is_one_message(
    fit: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = torch.empty

    def full(*size: Any, **settings: Any) -> torch.Tensor:
        if "pin_memory" in settings and settings["dtype"] == torch.uint8:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*size, **settings)

    monkeypatch.setattr(background.torch, "empty", full)
    with pytest.raises(InputError, match=r"room in host memory .*: CUDA error: out of memory. Set .*background=False"):
        fit(saver(tmp_path))
    assert not names(tmp_path)


class Counting(SFTModule):
    """Has a buffer that each forward pass changes, and says when one has begun."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("passes", torch.zeros(3))
        self.has_begun = threading.Event()

    def forward(self, batch: Any) -> Any:
        self.passes += 1
        self.has_begun.set()
        return super().forward(batch)


@pytest.fixture
def slow_copy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The thread copies step 3 only when the next forward pass has begun; counts of the tensors that it may copy."""
    counts, finish, settled = list[int](), HostBuffers.finish, saving.settled
    has_begun = threading.Event()
    has_begun.set()

    def watched(trainer: Trainer) -> list[torch.Tensor]:
        found = settled(trainer)
        counts.append(len(found))
        if found and trainer.global_step == 3:
            cast(Counting, trainer.lightning_module).has_begun = has_begun
            has_begun.clear()
        return found

    def slow(self: HostBuffers) -> bool:
        assert has_begun.wait(60), "the forward pass waits for the copy"
        time.sleep(0.2)
        return finish(self)

    monkeypatch.setattr(saving, "settled", watched)
    monkeypatch.setattr(HostBuffers, "finish", slow)
    return counts


def test_the_next_optimizer_step_alone_waits_for_the_copy_of_weights_and_states(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]], slow_copy: list[int], tmp_path: Path
) -> None:
    for in_background in (False, True):
        callbacks = [saver(tmp_path / f"{in_background}", keep_last=9, in_background=in_background)]
        trainer = quiet_trainer(
            enable_checkpointing=True, callbacks=callbacks, max_steps=5, accumulate_grad_batches=2, max_epochs=-1
        )
        module = Counting(pretrained, optimizer=partial(AdamW, lr=1e-2), schedule="constant", warmup=0.0)
        trainer.fit(module, SFTDataModule(train=rows, tokens_per_batch=40))
    assert slow_copy == [4 * len(list(module.parameters()))] * 2  # two saves of weights with three states each
    assert names(tmp_path / "True") == names(tmp_path / "False")
    for name in names(tmp_path / "True"):
        inline, own = (torch.load(tmp_path / folder / name, weights_only=True) for folder in ("False", "True"))
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops", POSITION_KEY):
            assert equal(inline[key], own[key]), (name, key)


class Clamping(Callback):
    """Changes weights between two optimizer steps, in a way that torch does not count."""

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        for parameter in pl_module.parameters():
            parameter.data.clamp_(-0.01, 0.01)


def test_nothing_is_left_to_the_thread_where_other_code_may_change_weights_between_two_steps(
    fit: Callable[..., Trainer], slow_copy: list[int], tmp_path: Path
) -> None:
    for in_background in (False, True):
        fit(Clamping(), saver(tmp_path / f"{in_background}", keep_last=9, in_background=in_background), max_steps=6)
    assert set(slow_copy) == {0}
    for name in names(tmp_path / "True"):
        inline, own = (torch.load(tmp_path / folder / name, weights_only=True) for folder in ("False", "True"))
        assert equal(inline["state_dict"], own["state_dict"])


class Scaling(SFTModule):
    """Changes a weight in its forward pass, which no hook shows."""

    def forward(self, batch: Any) -> Any:
        with torch.no_grad():
            next(self.parameters()).mul_(0.5)
        return super().forward(batch)


def test_a_weight_that_changes_while_it_is_copied_ends_training_with_one_message(
    pretrained: str,
    quiet_trainer: Make,
    rows: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    finish = HostBuffers.finish
    monkeypatch.setattr(HostBuffers, "finish", lambda self: (time.sleep(0.5), finish(self))[1])
    trainer = quiet_trainer(enable_checkpointing=True, callbacks=[saver(tmp_path)], max_steps=8)
    with pytest.raises(InputError, match="was not written: weights or states of an optimizer were changed outside"):
        trainer.fit(Scaling(pretrained), SFTDataModule(train=rows, tokens_per_batch=40))
    assert not names(tmp_path)


def test_what_cannot_write_in_the_background_is_refused(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"in_background=True\) needs a single device, ddp or fsdp2; FSDPStrategy"):
        BackgroundWriter(FSDPStrategy())
    with pytest.raises(InputError, match=r"Remove the plugin from trainer.plugins, and set .*in_background=True"):
        fit(saver(tmp_path), plugins=[AsyncCheckpointIO()])
