"""What a subclass has beside the model resumes, and is left out of exports and chats with one line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import HFExport
from lightning_sft.checkpoints.reading import META
from lightning_sft.commands.chat_model import Speaker
from lightning_sft.export.convert import export_checkpoint
from lightning_sft.model.tuning.adapters import Lora
from tests.helpers.gradients import QUIET, ROWS

LINE = "Left out, since the module has it beside the model: head.bias, head.weight, seen, temperature."


class Counted(SFTModule):
    """A buffer, a parameter and a module beside the model, as docs/concepts/resume.md advises for a buffer."""

    seen: torch.Tensor

    def configure_model(self) -> None:
        super().configure_model()
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.zeros(()))
            self.temperature = torch.nn.Parameter(torch.ones(()))
            self.head = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += 1
        return super().training_step(batch, batch_idx)


def fit(pretrained: str, kind: type[SFTModule], lora: Any, *callbacks: Any) -> Trainer:
    if lora is not None:
        pytest.importorskip("peft")
    settings: dict[str, Any] = {"max_steps": 2, "max_epochs": -1, "callbacks": list(callbacks)}
    trainer = Trainer(accelerator="cpu", **QUIET | settings)
    torch.manual_seed(0)  # of adapters
    trainer.fit(kind(pretrained, lora=lora), SFTDataModule(ROWS, val=ROWS, tokens_per_batch=100))
    return trainer


@pytest.mark.parametrize("lora", [None, Lora(r=2)])
def test_it_is_left_out_of_an_export_and_a_chat(
    lora: Any, pretrained: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(pretrained, Counted, lora, HFExport(str(tmp_path / "live"))).save_checkpoint(tmp_path / "own.ckpt")
    fit(pretrained, SFTModule, lora).save_checkpoint(tmp_path / "plain.ckpt")
    caplog.set_level(logging.INFO)
    caplog.clear()
    own = export_checkpoint(tmp_path / "own.ckpt", tmp_path / "own")
    assert caplog.text.count(LINE) == 1
    assert torch.load(tmp_path / "own.ckpt")["state_dict"]["seen"] == 2
    caplog.clear()
    plain = export_checkpoint(tmp_path / "plain.ckpt", tmp_path / "plain")
    assert "Left out" not in caplog.text
    wanted = load_file(plain / "model.safetensors")
    for folder in (own, tmp_path / "live" / "final"):
        found = load_file(folder / "model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    caplog.clear()
    Speaker(tmp_path / "own.ckpt", device="cpu")
    assert caplog.text.count(LINE) == 1


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_it_is_left_out_of_a_distributed_checkpoint_which_is_still_read_a_part_at_a_time(
    pretrained: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(pretrained, Counted, None).save_checkpoint(tmp_path / "own.ckpt")
    whole = torch.load(tmp_path / "own.ckpt")
    save({"state_dict": whole.pop("state_dict")}, checkpoint_id=tmp_path / "shards.ckpt", no_dist=True)
    torch.save(whole, tmp_path / "shards.ckpt" / META)
    caplog.set_level(logging.INFO)
    ours, theirs = (export_checkpoint(tmp_path / f"{name}.ckpt", tmp_path / name) for name in ("shards", "own"))
    assert caplog.text.count(LINE) == 2
    assert "The whole model is read" not in caplog.text
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
