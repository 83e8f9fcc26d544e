"""Lightning's averages of weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import BestCheckpoint, HFExport, RunRecord, SafeCheckpoint
from lightning_sft.export.convert import export_checkpoint
from lightning_sft.types import InputError
from tests.helpers.gradients import ROWS

Make = Callable[..., Trainer]
DECAY = 0.6
# Lightning says it of every module with a configure_model: its models are not sharded
pytestmark = pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")


class Steps(Callback):
    """The weights after each step, and those that are validated."""

    def __init__(self) -> None:
        self.weights: list[list[torch.Tensor]] = []
        self.validated: list[list[torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append([p.detach().clone() for p in pl_module.parameters()])

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.validated.append([p.detach().clone() for p in pl_module.parameters()])


def averaged(weights: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    found = weights[0]
    for now in weights[1:]:
        found = [DECAY * a + (1 - DECAY) * b for a, b in zip(found, now, strict=True)]
    return found


def are_close(a: Any, b: Any) -> bool:
    return all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b, strict=True))


def fit(make: Make, pretrained: str, folder: Path, *more: Callback, epochs: int = 2, **settings: Any) -> Any:
    steps, module_settings = Steps(), {"lora": settings.pop("lora", None)}
    callbacks = [EMAWeightAveraging(decay=DECAY), steps, SafeCheckpoint(str(folder / "saved"), keep_last=9), *more]
    trainer = make(callbacks=callbacks, max_epochs=epochs, enable_checkpointing=True, num_sanity_val_steps=0)
    module = SFTModule(
        pretrained, optimizer=lambda groups: AdamW(groups, lr=1e-2), schedule="constant", **module_settings
    )
    trainer.fit(module, SFTDataModule(train=ROWS, val=ROWS[:4], tokens_per_batch=200), **settings)
    return module, steps


def test_averaged_weights_are_validated_saved_and_exported(
    pretrained: str, quiet_trainer: Make, tmp_path: Path
) -> None:
    live, record = HFExport(str(tmp_path / "live")), RunRecord(str(tmp_path / "record"))
    best = BestCheckpoint(tmp_path)
    module, steps = fit(quiet_trainer, pretrained, tmp_path, live, record, best)
    average = averaged(steps.weights)
    assert not are_close(average, steps.weights[-1])
    assert are_close(module.parameters(), average)
    assert are_close(steps.validated[-1], average)
    [last] = sorted((tmp_path / "saved").glob("resume-epoch=1-*.ckpt"))
    export_checkpoint(str(last), str(tmp_path / "exported"))
    export_checkpoint(best.best_model_path, str(tmp_path / "best"))
    for folder in (tmp_path / "exported", tmp_path / "live" / "final", tmp_path / "best"):
        exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert are_close(exported.parameters(), average), folder


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_run_with_averages_goes_on_to_the_bit(
    pretrained: str, quiet_trainer: Make, tmp_path: Path, lora: Any
) -> None:
    whole, steps = fit(quiet_trainer, pretrained, tmp_path / "whole", lora=lora)
    [first] = (tmp_path / "whole" / "saved").glob("resume-epoch=0-*.ckpt")
    again, more = fit(quiet_trainer, pretrained, tmp_path / "whole", lora=lora, ckpt_path=str(first))
    num_steps = len(more.weights)
    assert 0 < num_steps < len(steps.weights)
    for a, b in zip(more.weights, steps.weights[-num_steps:], strict=True):
        assert all(map(torch.equal, a, b))
    assert all(map(torch.equal, again.parameters(), whole.parameters()))


def test_an_export_before_the_averages_are_in_the_model_is_refused(
    pretrained: str, quiet_trainer: Make, tmp_path: Path
) -> None:
    callbacks = [HFExport(str(tmp_path / "live")), EMAWeightAveraging()]
    with pytest.raises(InputError, match=r"Put HFExport after it"):
        quiet_trainer(callbacks=callbacks).fit(SFTModule(pretrained), SFTDataModule(train=ROWS))
