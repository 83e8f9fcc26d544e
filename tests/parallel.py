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

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if not trainer.strategy.handles_gradient_accumulation:
            self.norms.append(norm_of([p.grad for p in module.parameters() if p.grad is not None]))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > len(self.losses):
            self.losses.append(trainer.callback_metrics["train/loss"].item())
            if trainer.strategy.handles_gradient_accumulation:
                self.norms.append(float(trainer.strategy.deepspeed_engine.get_global_grad_norm()))


def whole(tensor: Any) -> Tensor:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def norm_of(tensors: list[Tensor]) -> float:
    return float(torch.stack([whole(tensor).double().norm() for tensor in tensors]).norm())


def ten_steps(pretrained: str, model: dict[str, Any] | None = None, **settings: Any) -> Curve:
    """A fit of ten steps with plain SGD, in which a wrong factor of the gradient shows in every later loss."""
    curve = Curve()
    module = SFTModule(pretrained, optimizer=partial(SGD, lr=0.5), schedule="constant", warmup=0.0, **(model or {}))
    Trainer(accelerator="cpu", callbacks=[curve], **QUIET, **{**COMMON, **settings}).fit(module, SFTDataModule(**DATA))
    return curve


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
        if torch.distributed.get_rank() == 0:
            Path(out, f"{name}.json").write_text(json.dumps([done.losses, done.norms]))
