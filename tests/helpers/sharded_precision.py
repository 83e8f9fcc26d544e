"""Two steps of a fit in two processes, with what was seen of dtypes, run under torchrun by test_precision."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sft import SFTDataModule, SFTModule
from tests.helpers.gradients import QUIET
from tests.helpers.parallel import TRAIN


class Casts(TorchDispatchMode):
    """Shapes of matrices that are cast from float32 to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16 and args[0].dtype == torch.float32:
            self.shapes.append(tuple(out.shape))
        return out


def run(pretrained: str, strategy: Any, precision: Any) -> dict[str, Any]:
    """What a fit shows: losses, dtypes of states and gradients, which weights were cast, RoPE's frequencies."""
    shown: dict[str, Any] = {"losses": [], "states": set(), "gradients": set(), "casts": 0}

    class Spy(SFTModule):
        def configure_model(self) -> None:
            if self.scorer is None:
                super().configure_model()
                assert self.model is not None
                shown["weights"] = [tuple(p.shape) for p in self.model.parameters() if p.ndim == 2]
                self.model.base_model.norm.register_forward_hook(lambda m, a, out: shown["states"].add(str(out.dtype)))

        def training_step(self, *args: Any) -> Any:
            with Casts() as casts:
                loss = super().training_step(*args)
            shown["casts"] += sum(shape in shown["weights"] for shape in casts.shapes)
            return loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            shown["gradients"] |= {str(p.grad.dtype) for p in self.parameters() if p.grad is not None}
            super().on_before_optimizer_step(optimizer)

        def on_train_batch_end(self, *args: Any) -> None:
            shown["losses"].append(self.trainer.callback_metrics["train/loss"].item())

    module = Spy(pretrained, optimizer=partial(SGD, lr=0.1), schedule="constant", warmup=0.0)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, precision=precision, max_steps=2, max_epochs=-1, **QUIET
    )
    trainer.fit(module, SFTDataModule(train=TRAIN, tokens_per_batch=100))
    assert module.model is not None
    frequencies = module.model.base_model.rotary_emb.inv_freq
    return shown | {"rope": (str(frequencies.dtype), frequencies.tolist())}


def strategies(names: list[str]) -> dict[str, Any]:
    """By name; DeepSpeed through the subclass that runs on CPUs."""
    found: dict[str, Any] = dict.fromkeys(names)
    for name in names:
        if name.startswith("deepspeed"):
            from tests.helpers.deepspeed_cpu import DeepSpeedOnCPU

            found[name] = DeepSpeedOnCPU(int(name[-1]))
        else:
            found[name] = name
    return found


if __name__ == "__main__":
    given, where, *cases = sys.argv[1:]
    for case in cases:
        name, precision = case.split(",")
        result = run(given, strategies([name])[name], precision)
        if int(os.environ["RANK"]) == 0:
            plain = {key: sorted(value) if isinstance(value, set) else value for key, value in result.items()}
            Path(where, f"{case}.json").write_text(json.dumps(plain))
