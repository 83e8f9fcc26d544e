"""Helpers of test_strategies, run under torchrun: what ten steps of a fit do under a strategy."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import SGD

import lightning_sft.strategies  # registers fsdp2
from lightning_sft import SFTDataModule, SFTModule
from tests.gradients import QUIET, ROWS

COMMON: dict[str, Any] = {"max_steps": 10, "max_epochs": -1, "gradient_clip_val": 0.5}
DATA = {"train": [{**row, "prompt": f"{i} {row['prompt']}"} for i in range(4) for row in ROWS], "tokens_per_batch": 100}


@dataclass
class Curve(Callback):
    """Loss and gradient norm of every step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    seen: int = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.seen = trainer.global_step

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if not trainer.strategy.handles_gradient_accumulation:
            self.norms.append(norm_of([p.grad for p in module.parameters() if p.grad is not None]))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > self.seen:
            self.seen = trainer.global_step
            self.losses.append(trainer.callback_metrics["train/loss"].item())
            if trainer.strategy.handles_gradient_accumulation:
                self.norms.append(float(trainer.strategy.deepspeed_engine.get_global_grad_norm()))


def whole(tensor: Any) -> Tensor:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def norm_of(tensors: list[Tensor]) -> float:
    return float(torch.stack([whole(tensor).double().norm() for tensor in tensors]).norm())


def ten_steps(pretrained: str, ckpt_path: Any = None, callbacks: Any = (), **settings: Any) -> Curve:
    """A fit of ten steps; with momentum, and lengths that a wrong factor of the gradient would change for good."""
    curve = Curve()
    optimizer = partial(SGD, lr=0.1, momentum=0.9)
    module = SFTModule(pretrained, optimizer=optimizer, schedule="constant", warmup=0.0)
    settings = {**COMMON, **QUIET, **settings, "callbacks": [curve, *callbacks]}
    Trainer(accelerator="cpu", **settings).fit(module, SFTDataModule(**DATA), ckpt_path=ckpt_path)
    return curve


def interrupted(pretrained: str, name: str, out: Path, settings: dict[str, Any]) -> Curve:
    """The same in two runs: one that writes a checkpoint after each fourth step, and one that goes on with it."""
    saver = ModelCheckpoint(out / name, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    begun = {**settings, "max_steps": 6, "enable_checkpointing": True, "callbacks": [saver]}
    ten_steps(pretrained, strategy=strategy(name), **begun)
    return ten_steps(pretrained, strategy=strategy(name), ckpt_path=out / name / "step=4.ckpt", **settings)


def strategy(name: str) -> Any:
    """By the name that the cases have for it."""
    if name.startswith("deepspeed"):
        from tests.deepspeed_cpu import DeepSpeedOnCPU

        return DeepSpeedOnCPU(stage=int(name[-1]))
    if name.startswith("mesh"):
        data, tensor = map(int, name.split("-")[1:])
        return lightning_sft.strategies.FSDP2Strategy(data, tensor)
    return name


if __name__ == "__main__":
    pretrained, out, *names = sys.argv[1:]
    for case in names:
        name, settings = case.split(":", 1)
        done = ten_steps(pretrained, strategy=strategy(name), **json.loads(settings))
        resumed = interrupted(pretrained, name, Path(out), json.loads(settings))
        if torch.distributed.get_rank() == 0:
            Path(out, f"{name}.json").write_text(json.dumps([done.losses, done.norms, resumed.losses]))
