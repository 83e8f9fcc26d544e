"""Our callbacks in a script of a user."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_sft import SFTDataModule, SFTModule, callbacks
from lightning_sft.types import InputError
from tests.helpers.dropping import run_code
from tests.helpers.gradients import ROWS

Make = Callable[..., Trainer]
pytestmark = pytest.mark.usefixtures("project")


@pytest.fixture
def module() -> Any:
    return run_code("Our data, your module")["YourModule"]()


def fit(make: Make, module: Any, *own: Any) -> Any:
    data = SFTDataModule(train=ROWS, tokens_per_batch=100)
    make(callbacks=list(own), enable_checkpointing=True, enable_progress_bar=True).fit(module, data)
    return [p.detach().clone() for p in module.parameters()]


def test_callbacks_of_ours_work_with_a_users_module(project: Path, quiet_trainer: Make, module: Any) -> None:
    record, ledger = callbacks.RunRecord("run"), callbacks.SampleLedger("run")
    saver = callbacks.SafeCheckpoint("saved", every_n_train_steps=2)
    fit(quiet_trainer, module, saver, callbacks.Preempt(), record, ledger, callbacks.TrainingProgress())
    steps = [json.loads(line) for line in (project / "run" / "samples.jsonl").read_text().splitlines()]
    assert sorted(name for step in steps for micro in step["samples"][0] for name in micro) == sorted(
        f"row {number}" for number in range(1, len(ROWS) + 1)
    )
    assert json.loads((project / "run" / "run.json").read_text())["pretrained"] == "SmolLM2"
    saved = torch.load(max((project / "saved").glob("resume-*.ckpt"), key=lambda path: path.stat().st_mtime_ns))
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in module.state_dict().items())


def test_the_optimizer_steps_in_the_backward_pass_of_a_users_module(quiet_trainer: Make) -> None:
    make = run_code("Our data, your module")["YourModule"]
    together, apart = (
        fit(quiet_trainer, make(), callbacks.SafeCheckpoint(f"saved{i}"), *own)
        for i, own in enumerate([(), (callbacks.OptimizerInBackward(),)])
    )
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_predictions_of_a_users_module_are_written_in_their_order(
    project: Path, quiet_trainer: Make, module: Any
) -> None:
    module.predict_step = lambda batch, batch_idx: [{"prediction": f"{number.item()}"} for number in batch]
    writer = callbacks.PredictionWriter("out.jsonl")
    quiet_trainer(callbacks=[writer]).predict(module, DataLoader(torch.arange(5), batch_size=2))
    rows = [json.loads(line) for line in (project / "out.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in rows] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("kind", [callbacks.DriftMonitor, callbacks.HFExport, callbacks.SampleGenerations])
def test_callbacks_that_look_into_the_model_refuse_another_module(quiet_trainer: Make, module: Any, kind: Any) -> None:
    with pytest.raises(InputError, match=rf"{kind.__name__} looks into the model of an SFTModule, and YourModule is"):
        fit(quiet_trainer, module, kind(), callbacks.SafeCheckpoint("saved"))


def test_callbacks_that_ask_refuse_data_without_prompts(pretrained: str, quiet_trainer: Make) -> None:
    class Data(run_code("Your data, our module")["YourData"]):
        def test_dataloader(self) -> Any:
            return self.train_dataloader()

    with pytest.raises(InputError, match=r"SampleGenerations takes prompts and the tokenizer from SFTDataModule"):
        quiet_trainer(callbacks=[callbacks.SampleGenerations()]).fit(SFTModule(pretrained), Data())
    with pytest.raises(InputError, match=r"ScoreAnswers takes prompts and the tokenizer from SFTDataModule"):
        quiet_trainer(callbacks=[callbacks.ScoreAnswers()]).test(SFTModule(pretrained), Data())


def test_the_optimizer_in_backward_refuses_batches_that_nobody_has_planned(
    pretrained: str, quiet_trainer: Make
) -> None:
    data = run_code("Your data, our module")["YourData"]()
    with pytest.raises(InputError, match=r"OptimizerInBackward needs batches of SFTDataModule"):
        quiet_trainer(callbacks=[callbacks.OptimizerInBackward()]).fit(SFTModule(pretrained), data)
