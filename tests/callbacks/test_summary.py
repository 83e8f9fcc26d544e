"""What a fit is about to do is said once, before its first step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary
from torch.utils.data import DataLoader

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import KeepMemory, RunSummary, SafeCheckpoint
from lightning_sft.callbacks.defaults import default_callbacks
from lightning_sft.callbacks.summary import summary
from lightning_sft.model.tuning.adapters import Lora


def fitted(quiet_trainer: Any, module: Any, rows: Any, *callbacks: Any, **settings: Any) -> Any:
    trainer = quiet_trainer(enable_model_summary=True, callbacks=[RunSummary(), *callbacks], max_epochs=2, **settings)
    trainer.fit(module, SFTDataModule(train=rows, tokens_per_batch=100))
    return trainer


def test_the_summary_is_printed_once_and_takes_the_place_of_other_messages(
    pretrained: str,
    quiet_trainer: Any,
    rows: list[dict[str, str]],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = fitted(quiet_trainer, SFTModule(pretrained), rows, KeepMemory())
    out = capsys.readouterr().out
    names = re.findall(r"^([A-Z]\w+)  +\S", out, re.MULTILINE)
    assert names == ["Model", "Trained", "Precision", "Devices", "Attention", "Kernels", "Optimizer", "Steps", "Memory"]
    assert all(len(line) <= 80 for line in out[out.index("Model  ") :].splitlines())
    said = dict(summary(trainer, trainer.lightning_module))
    num = sum(parameter.numel() for parameter in trainer.lightning_module.parameters())
    assert said["Model"] == f"llama, LlamaForCausalLM, {num:,} parameters"
    assert said["Trained"] == "all"
    assert said["Precision"] == "32-true; trained weights in float32"
    assert said["Steps"] == f"{trainer.global_step}, of which {trainer.global_step} are done; an epoch has 4"
    assert "KeepMemory" in said["Memory"]
    assert not any(said in caplog.text for said in ("Attention", "Freed memory", "Name   |"))
    assert not any(type(callback) is ModelSummary for callback in trainer.callbacks)


def test_adapters_and_the_folders_are_named(
    pretrained: str, quiet_trainer: Any, rows: list[dict[str, str]], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module, saver = SFTModule(pretrained, lora=Lora(r=2)), SafeCheckpoint(str(tmp_path / "saved"))
    trainer = fitted(quiet_trainer, module, rows, saver, enable_checkpointing=True)
    said = dict(summary(trainer, module))
    num = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    assert said["Trained"].startswith(f"{num:,} parameters (")
    assert said["Checkpoints"] == "saved"
    assert said["Optimizer"] == "AdamW with a learning rate of 2e-05; cosine schedule, warm-up 3%"


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # of the callback that saved it
def test_a_run_that_resumes_within_an_epoch_is_summarized_before_its_first_step(
    pretrained: str, quiet_trainer: Any, rows: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data: dict[str, Any] = {"train": rows, "tokens_per_batch": 64}
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    quiet_trainer(callbacks=[saver], enable_checkpointing=True, max_steps=1).fit(
        SFTModule(pretrained, schedule="constant"), SFTDataModule(**data)
    )

    class Heard(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            self.text = getattr(self, "text", capsys.readouterr().out)

    heard = Heard()
    trainer = quiet_trainer(callbacks=[RunSummary(), heard], max_epochs=2)
    trainer.fit(
        SFTModule(pretrained, schedule="constant"), SFTDataModule(**data), ckpt_path=str(tmp_path / "step=1.ckpt")
    )
    assert "Model " in heard.text
    assert "of which 1 are done" in heard.text


def test_without_it_the_same_facts_are_logged(
    pretrained: str, quiet_trainer: Any, rows: list[dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    quiet_trainer().fit(SFTModule(pretrained), SFTDataModule(train=rows, tokens_per_batch=100))
    assert "Attention per_document: " in caplog.text


def test_a_module_of_the_users_own_is_summarized_too(quiet_trainer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class Own(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2, bias=False)
            self.frozen = torch.nn.Parameter(torch.ones(8), requires_grad=False)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.layer.parameters(), lr=0.5)

    trainer = quiet_trainer(enable_model_summary=True, callbacks=[RunSummary()])
    trainer.fit(Own(), DataLoader(torch.ones(3, 4), batch_size=1))
    out = capsys.readouterr().out
    assert re.search(r"^Model +Own, 16 parameters *$", out, re.MULTILINE)
    assert re.search(r"^Trained +8 parameters \(50.00%\) *$", out, re.MULTILINE)
    assert re.search(r"^Steps +3 *$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("settings", "shown"), [({}, 1), ({"enable_model_summary": False}, 0), ({"barebones": True}, 0)]
)
def test_the_command_line_adds_it_unless_asked_not_to(settings: dict[str, Any], shown: int) -> None:
    assert sum(isinstance(callback, RunSummary) for callback in default_callbacks(settings, False)) == shown
    assert not any(isinstance(callback, RunSummary) for callback in default_callbacks(settings, False, is_fit=False))


def test_the_memory_of_a_tiny_model_is_not_none(pretrained: str, quiet_trainer: Any, rows: Any) -> None:
    trainer = fitted(quiet_trainer, SFTModule(pretrained), rows)
    said = dict(summary(trainer, trainer.lightning_module))["Memory"]
    assert said.startswith("0.05 MiB weights + 0.05 MiB gradients + 0.10 MiB optimizer on each device")
