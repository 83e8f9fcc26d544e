"""More in test_resume: processes that are told to end, two of them by one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import RunRecord, SafeCheckpoint, SampleLedger
from lightning_sft.callbacks.preempt import Preempt, Preempted
from lightning_sft.checkpoints.resume import POSITION_KEY
from lightning_sft.checkpoints.run_files import lines_of
from lightning_sft.types import InputError
from tests.helpers.processes import Ended, fork

Make = Callable[..., Trainer]


class Tell(Callback):
    """Sends this process a signal, in training or in validation."""

    def __init__(self, number: int, of: str = "train") -> None:
        self.number, self.of, self.stepped_on = number, of, 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self.of == "train" and batch_idx == 1:
            os.kill(os.getpid(), self.number)
        self.stepped_on = batch_idx

    def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
        if self.of == "val" and not trainer.sanity_checking:
            os.kill(os.getpid(), self.number)


def fit(pretrained: str, trainer: Trainer, rows: list[dict[str, str]]) -> None:
    data = SFTDataModule(train=rows, val=rows, tokens_per_batch=60)
    trainer.fit(SFTModule(pretrained, schedule="constant"), data)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_fit_after_the_step_with_a_checkpoint_and_code_75(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]], tmp_path: Path, number: int, caplog: Any
) -> None:
    before, tell = signal.getsignal(number), Tell(number)
    trainer = quiet_trainer(accumulate_grad_batches=4, callbacks=[tell, Preempt()])
    with pytest.raises(Preempted) as stop, caplog.at_level("INFO"):
        fit(pretrained, trainer, rows)
    path = tmp_path / "checkpoints" / "resume-step=1.ckpt"  # no callback of the trainer would find it as the last
    assert f'saved step 1 to {path}. Resume with trainer.fit(..., ckpt_path="{path}").' in caplog.text
    assert stop.value.code == 75
    assert tell.stepped_on == 3
    saved = torch.load(path, weights_only=True)
    assert saved[POSITION_KEY]["micro_batches"] == 4
    assert signal.getsignal(number) == before


def test_in_a_validation_it_does_not_wait_for_the_end_and_the_validation_is_still_due(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path / "own", save_top_k=0)
    trainer = quiet_trainer(callbacks=[Tell(signal.SIGTERM, "val"), Preempt(), saver], enable_checkpointing=True)
    with pytest.raises(Preempted):
        fit(pretrained, trainer, rows)
    [path] = (tmp_path / "own").glob("resume-*.ckpt")  # where the user's own are
    place = torch.load(path, weights_only=True)[POSITION_KEY]
    assert (place["is_last"], place["is_validated"]) == (True, False)
    assert "val/loss" not in trainer.callback_metrics


def test_in_a_validation_before_the_first_step_there_is_nothing_to_save(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]], tmp_path: Path, capsys: Any, caplog: Any
) -> None:
    callbacks = [Tell(signal.SIGTERM, "val"), Preempt(), SafeCheckpoint(str(tmp_path / "own"))]
    between = {"accumulate_grad_batches": 3, "val_check_interval": 1, "enable_checkpointing": True}
    with caplog.at_level("INFO"), pytest.raises(Preempted):
        fit(pretrained, quiet_trainer(callbacks=callbacks, **between), rows)
    assert "nothing was saved, since no step was finished" in caplog.text + capsys.readouterr().out
    assert not list(tmp_path.rglob("*.ckpt"))


def test_an_unknown_signal_is_refused() -> None:
    with pytest.raises(InputError, match=r"Unknown signal TERM. Expected names such as SIGTERM"):
        Preempt(["TERM"])


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging")
@pytest.mark.parametrize("is_first", [True, False])
def test_the_step_that_it_ends_after_is_in_the_files_of_the_run_whatever_the_order_of_callbacks(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]], tmp_path: Path, is_first: bool
) -> None:
    averages = WeightAveraging(avg_fn=lambda averaged, current, _: (averaged + current) / 2)
    others = [SampleLedger(str(tmp_path)), RunRecord(str(tmp_path)), averages]
    preempt = Preempt()
    callbacks = [preempt, *others] if is_first else [*others, preempt]
    callbacks = [Tell(signal.SIGTERM), *callbacks, SafeCheckpoint(str(tmp_path))]
    trainer = quiet_trainer(callbacks=callbacks, enable_checkpointing=True)
    with pytest.raises(Preempted):
        fit(pretrained, trainer, rows)
    assert [line["step"] for line, _ in lines_of(tmp_path / "samples.jsonl")] == [1, 2]
    assert [line["step"] for line, _ in lines_of(tmp_path / "metrics.jsonl")] == [1, 2]
    [path] = tmp_path.glob("*.ckpt")
    assert torch.load(path, weights_only=True)["averaging_state"]["n_averaged"] == 2
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["starts"][0]["end"] == {"step": 2, "reason": "Preempted: received SIGTERM"}
    assert record["saved"]


def interrupted(pretrained: str, folder: Path, name: str, times: int, **settings: Any) -> Ended:
    """A run whose processes are all sent a signal in its first step."""
    own = [pretrained, str(folder), name, str(times), json.dumps(settings)]
    [ended] = fork("tests.helpers.interrupting", *own, timeout=120, fails=True)
    return ended


@pytest.mark.parametrize(
    ("name", "settings"), [("SIGINT", {}), ("SIGTERM", {}), ("SIGTERM", {"streaming": True, "buffer_rows": 12})]
)
def test_a_signal_to_all_processes_leaves_data_workers_alone_so_that_the_step_can_be_taken(
    pretrained: str, tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    ended = interrupted(pretrained, tmp_path, name, times=1, num_workers=2, **settings)
    assert ended.code == 75, ended.errors
    [path] = (tmp_path / "checkpoints").glob("*.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 1
    told = "Interrupted: saving a checkpoint after this step.\nPress Ctrl-C again to end at once"
    assert ended.errors.count(told) == (name == "SIGINT")
    assert f'Received {name}; saved step 1 to {path}. Resume with trainer.fit(..., ckpt_path="last").' in ended.errors


def test_a_second_ctrl_c_ends_the_process_at_once(pretrained: str, tmp_path: Path) -> None:
    assert interrupted(pretrained, tmp_path, "SIGINT", times=2).code == -signal.SIGINT
    assert not list((tmp_path / "checkpoints").glob("*.ckpt"))
