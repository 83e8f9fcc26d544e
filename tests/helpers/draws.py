"""Ranks whose steps draw at random: ``torchrun -m tests.helpers.draws MODEL FOLDER WAY`` keeps the weights of each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.optim import SGD

from tests.helpers.resuming import Run

WAYS = ("gradient", "weights", "optimizer")


class NoisyGradient(Callback):
    """Noise on the gradient of each step."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        for parameter in module.parameters():
            parameter.grad += 0.1 * torch.randn_like(parameter.grad)


class NoisyWeights(Callback):
    """Noise on the weights after each step."""

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1 + 0.01 * torch.randn_like(parameter))


class Langevin(SGD):
    """An optimizer that draws at random."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        return loss


class Kept(Callback):
    """Keeps the weights of each rank as they are at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, module: Any) -> None:
        torch.save(list(module.parameters()), self.folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    pretrained, where, way = sys.argv[1:]
    noise: dict[str, list[Callback]] = {"gradient": [NoisyGradient()], "weights": [NoisyWeights()]}
    model = {"optimizer": lambda groups: Langevin(groups, lr=0.1)} if way == "optimizer" else {}
    kept = Kept(Path(where))
    Run(ranks=2, model=model).fit(pretrained, Path(where), *noise.get(way, []), kept, max_epochs=1)
