"""Optimizers whose states take 8 bits, 4 bits or bfloat16: they follow the schedule and resume bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.checkpoints.reading import Checkpoint
from lightning_sft.demos import tiny_pretrained
from lightning_sft.training.schedules import learning_rate_factor
from lightning_sft.types import InputError
from tests.helpers.gradients import ROWS

Make = Callable[..., Trainer]

TORCHAO = ["AdamW8bit", "AdamW4bit", "AdamWFp8"]


@pytest.fixture
def wide(tmp_path: Path) -> str:
    """One with matrices of 4,096 numbers and more: those of fewer keep their state in float32."""
    return tiny_pretrained(tmp_path / "wide", hidden_size=64, intermediate_size=64, head_dim=32)


@pytest.fixture
def optim(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torchao's, whose steps are not compiled: that takes minutes, and changes no state."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return pytest.importorskip("torchao.optim")


class Rates(Callback):
    """The learning rate that each step was taken with."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(float(optimizer.param_groups[0]["lr"]))


def fit(make: Make, pretrained: str, optimizer: Any, folder: Path, ckpt_path: Any = None, **settings: Any) -> Trainer:
    """Six steps, with a checkpoint after the third."""
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    own = {"max_steps": 6, "max_epochs": -1, "callbacks": [saver, Rates()], "enable_checkpointing": True}
    trainer = make(**{**own, **settings})
    module = SFTModule(pretrained, optimizer=optimizer, warmup=0.4)
    trainer.fit(module, SFTDataModule(train=ROWS, tokens_per_batch=100), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def everything(trainer: Trainer) -> list[Tensor]:
    """All weights, and all of the optimizer's state, quantized ones as what they are made of."""
    [optimizer] = trainer.optimizers
    found: list[Tensor] = [p.detach() for p in trainer.lightning_module.parameters()]
    for state in optimizer.state.values():
        for value in state.values():
            parts = [getattr(value, n) for n in value.__tensor_flatten__()[0]] if hasattr(value, "codes") else [value]
            found += [torch.as_tensor(part) for part in parts]
    return found


def check(make: Make, pretrained: str, optimizer: Any, folder: Path, **settings: Any) -> Trainer:
    whole = fit(make, pretrained, optimizer, folder / "one", **settings)
    resumed = fit(make, pretrained, optimizer, folder / "two", folder / "one" / "step=3.ckpt", **settings)
    rates, rest = (next(c.seen for c in t.callbacks if isinstance(c, Rates)) for t in (whole, resumed))
    assert rates == pytest.approx([1e-2 * learning_rate_factor(step, 6, "cosine", 0.4) for step in range(6)])
    assert rest == rates[3:]
    assert all(map(torch.equal, everything(whole), everything(resumed)))
    assert len(everything(whole)) == len(everything(resumed)) > 2 * len(list(whole.lightning_module.parameters()))
    return whole


@pytest.mark.parametrize("name", TORCHAO)
def test_quantized_states_of_torchao_resume_bit_for_bit(
    quiet_trainer: Make, wide: str, optim: Any, name: str, tmp_path: Path
) -> None:
    whole = check(quiet_trainer, wide, partial(getattr(optim, name), lr=1e-2), tmp_path)
    assert any(hasattr(v, "codes") for state in whole.optimizers[0].state.values() for v in state.values())


def test_bfloat16_states_with_stochastic_rounding_resume_bit_for_bit(
    quiet_trainer: Make, wide: str, optim: Any, tmp_path: Path
) -> None:
    optimizer = partial(optim._AdamW, lr=1e-2, bf16_stochastic_round=True)
    whole = check(quiet_trainer, wide, optimizer, tmp_path, precision="bf16-true")
    [state, *_] = whole.optimizers[0].state.values()
    assert state["exp_avg"].dtype == torch.bfloat16


def test_8_bit_states_of_bitsandbytes_resume_bit_for_bit(quiet_trainer: Make, wide: str, tmp_path: Path) -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    whole = check(quiet_trainer, wide, partial(optim.AdamW8bit, lr=1e-2), tmp_path)
    assert any(state["state1"].dtype == torch.uint8 for state in whole.optimizers[0].state.values())


@pytest.mark.slow
def test_a_checkpoint_with_quantized_states_is_read_where_their_package_was_not_imported(
    quiet_trainer: Make, wide: str, optim: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(quiet_trainer, wide, partial(optim.AdamW8bit, lr=1e-2), tmp_path / "run", max_steps=3)
    ckpt = tmp_path / "run" / "step=3.ckpt"
    code = (
        "import sys; from lightning_sft.checkpoints.reading import Checkpoint; "
        "from lightning_sft.checkpoints.writing import AtomicIO; "
        f"assert 'torchao' not in sys.modules; Checkpoint({str(ckpt)!r}).whole(); "
        f"AtomicIO().load_checkpoint({str(ckpt)!r}, weights_only=True)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    monkeypatch.setattr("lightning_sft.checkpoints.reading.find_spec", lambda name: None)
    with torch.serialization.safe_globals([]):
        monkeypatch.setattr(torch._weights_only_unpickler, "_marked_safe_globals_set", set())
        with pytest.raises(InputError, match="pip install torchao"):
            _ = Checkpoint(ckpt).metadata
